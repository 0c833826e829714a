"""Training steps: from a batch to its losses, one class per family of drafters.

In: a drafter's config. Out: the step that the trainer runs. A new family is added with
`register_step(model_type, kind)`.
"""

import importlib
from functools import reduce
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ...drafters.model import Drafter
from ...target import Target
from ..arguments import CoralTrainingArguments
from ..data.documents import part_begins
from ..data.encoding import IGNORED


class Trained(NamedTuple):
    """The trained positions of a batch."""

    predicted: Tensor  # (steps, positions, hidden)
    target: Tensor  # (positions, hidden), the features that were to be predicted
    lengths: list[int]  # trained positions of each document of the batch, or branch of one
    tokens: Tensor | None = None  # (positions,), of the text, that a feature gives
    kept: Tensor | None = None  # (steps, positions), which of `predicted` are trained; None: all


class Unrolled(NamedTuple):
    """What each step of an unroll predicts of a batch.

    position t           0       1       2       3       4
    token                x0      x1      x2      x3      x4
    label                -100    -100    x2      x3      x4
    target feature       f0      f1      f2      f3      f4
    predicted            f̂1      f̂2      f̂3      f̂4
    to be compared with  f1      f2      f3      f4
    whose token is       x2      x3      x4      (x5)         trained where its label is
    """

    predicted: Tensor  # (steps, batch, length - 1, hidden), at t the prediction of feature t + 1
    features: Tensor  # (batch, length, hidden), the target's
    labels: Tensor  # (batch, length), -100 where not trained
    position_ids: Tensor | None  # (batch, length), of packed rows
    kept: Tensor | None = None  # (steps, batch, length - 1), which are trained; None: all

    def first(self, steps: int) -> "Unrolled":
        """Keep the first steps alone."""
        kept = None if self.kept is None else self.kept[:steps]
        return self._replace(predicted=self.predicted[:steps], kept=kept)

    def trained(self) -> Trained:
        """Select the positions whose token, t + 2, is trained; the last has no such token."""
        # (batch, length - 1)
        is_trained = F.pad(self.labels[:, 2:] != IGNORED, (0, 1))
        if self.position_ids is None:
            lengths = is_trained.sum(1)
        else:
            part = part_begins(self.position_ids[:, :-1]).flatten().cumsum(0) - 1
            lengths = torch.bincount(part[is_trained.flatten()])
        target, tokens = self.features[:, 1:][is_trained], self.labels[:, 1:].roll(-1, 1)
        parts = self.predicted[:, is_trained], target, lengths.tolist(), tokens[is_trained]
        return Trained(*parts, None if self.kept is None else self.kept[:, is_trained])


class Losses(NamedTuple):
    """The terms of a loss, and sums to be logged; each () and summed over positions."""

    terms: dict[str, Tensor]
    notes: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The loss that is minimised, of shape ()."""
        return reduce(torch.add, self.terms.values())

    def __add__(self, other: "Losses") -> "Losses":  # type: ignore[override]
        return Losses({**self.terms, **other.terms}, {**self.notes, **other.notes})


class TrainingStep(Protocol):
    """How the trainer trains one family of drafters; made as `kind(config, target, args)`.

    `recipes` are those of `RECIPES` that are the family's, the first one by default.
    """

    drafter: ClassVar[type[Drafter]]
    recipes: ClassVar[tuple[str, ...]]
    stages: ClassVar[tuple[str, ...]]
    goals: ClassVar[tuple[str, ...]] = ("distribution",)  # what losses on tokens compare with
    can_shard: ClassVar[bool]  # whether FSDP and ZeRO-3 may hold parts of the drafter

    def __init__(self, config: Any, target: Target, args: CoralTrainingArguments):
        """Keep what the step reads: the drafter's config, its target, the settings of the run.

        Raises:
            ValueError: for settings that mean nothing to the family.
        """

    @classmethod
    def layers(cls, config: Any) -> tuple[int, ...]:
        """Which of the target's `hidden_states` a drafter is trained on; the last is the feature.

        Features of a batch, computed or cached, are these side by side.
        """

    @classmethod
    def fresh_fields(cls, args: CoralTrainingArguments) -> dict[str, Any]:
        """Fields of a fresh drafter's config that follow from the settings of its run."""
        return {}

    def prepare(self, drafter: Any, rows: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Get a drafter ready for its stage: make what it lacks, freeze what is not trained.

        Args:
            drafter: perhaps in a `PeftModel`.
            rows: the training rows; None for a trainer that only evaluates.
            tokenizer: the target's.
        """

    def unroll(self, model: nn.Module, batch: dict[str, Tensor], num_steps: int) -> Unrolled:
        """Run the drafter on a batch; every forward pass goes through `model`.

        Args:
            model: the drafter as the run wraps it (DDP, FSDP2, DeepSpeed).
            batch: of the collator, (batch, length) each; of a feature cache also `features`
                (batch, length, layers · hidden).
        """

    def losses(self, drafter: Any, trained: Trained) -> Losses:
        """Compute the losses of the stage; `drafter` has no wrappers, and may run its heads."""

    def choices(self, drafter: Any, predicted: Tensor, step: int) -> Tensor:
        """The token that the drafter finds best after a step, counted from 0.

        (rows, hidden) → (rows,)
        """


_KINDS: dict[str, type[TrainingStep]] = {}
# modules that register their step
_BUILT_IN = ("coral", "eagle3", "medusa", "parallel", "recurrent")


def register_step(model_type: str, kind: type[TrainingStep]) -> None:
    """Train drafters of a `model_type` with the steps that `kind(config, target, args)` makes."""
    _KINDS[model_type] = kind


def step_kinds() -> dict[str, type[TrainingStep]]:
    """The kind of step of each family, by the `model_type` of its drafters."""
    for name in _BUILT_IN:
        importlib.import_module(f"{__name__}.{name}")
    return _KINDS


def step_kind(model_type: str) -> type[TrainingStep]:
    """The kind of step of a family.

    Raises:
        ValueError: if none is registered for it.
    """
    if model_type not in step_kinds():
        raise ValueError(
            f"`model` is a {model_type!r} drafter, for which no training step is registered, only"
            f" for {sorted(_KINDS)}; see `coral_hf.training.steps.register_step`."
        )
    return _KINDS[model_type]


def kind_of_recipe(recipe: str) -> type[TrainingStep]:
    """The kind of step of the family that a recipe is for.

    Raises:
        ValueError: if it is for none.
    """
    kinds = step_kinds().values()
    found = next((kind for kind in kinds if recipe in kind.recipes), None)
    if found is None:
        names = tuple(name for kind in kinds for name in kind.recipes)
        raise ValueError(f"`recipe` is {recipe!r}; use one of {names}.")
    return found


def training_step(
    config: PreTrainedConfig, target: Target, args: CoralTrainingArguments
) -> TrainingStep:
    """Make the step of a family of drafters.

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
