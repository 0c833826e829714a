"""Training steps: from a batch to its losses, one class per family of drafters.

In: a drafter's config. Out: the step that the trainer runs. A new family is added with
`register_step(model_type, kind)`, where `kind` is a [`TrainingStep`].
"""

from typing import Any

from ...target import Target
from ..arguments import RECIPES, CoralTrainingArguments
from .base import TrainingStep
from .objectives import Losses, Trained, Unrolled

__all__ = ["Losses", "Trained", "TrainingStep", "Unrolled", "register_step", "step_kind"]
KINDS: dict[str, type[TrainingStep]] = {}  # by the `model_type` of their drafters


def register_step(model_type: str, kind: type[TrainingStep]) -> None:
    """Train drafters of a `model_type` with the steps that `kind(config, target, args)` makes."""
    KINDS[model_type] = kind


def step_kind(model_type: str) -> type[TrainingStep]:
    """The kind of step of a family.

    Raises:
        ValueError: if none is registered for it.
    """
    if model_type not in KINDS:
        raise ValueError(
            f"`model` is a {model_type!r} drafter, for which no training step is registered, only"
            f" for {sorted(KINDS)}; see `coral_hf.training.steps.register_step`."
        )
    return KINDS[model_type]


def kind_of_recipe(recipe: str) -> type[TrainingStep]:
    """The kind of step of the family that a recipe is for.

    Raises:
        ValueError: if it is for none.
    """
    for kind in KINDS.values():
        if recipe in kind.recipes:
            return kind
    raise ValueError(f"`recipe` is {recipe!r}; use one of {(*RECIPES,)}.")


def training_step(config: Any, target: Target, args: CoralTrainingArguments) -> TrainingStep:
    """Make the step of the family that a drafter's config is of.

    Raises:
        ValueError: if none is registered for it, and for a recipe, a stage or a goal that are of
            another family.
    """
    kind = step_kind(config.model_type)
    known_by_name = {"recipe": kind.recipes, "stage": kind.stages, "goal": (None, *kind.goals)}
    for name, known in known_by_name.items():
        if getattr(args, name) not in known:
            raise ValueError(
                f"`{name}` is {getattr(args, name)!r}, but `model` is a {kind.drafter.__name__};"
                f" use one of {known}."
            )
    return kind(config, target, args)


from . import coral, own_head, parallel  # noqa: E402, F401  they register their steps
