"""Recipes: the settings of published trainings, by name, each of them open to change."""

from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """What `CoralTrainingArguments` fills in where a setting is not given."""

    num_steps: int
    regression_weight: float
    classification_weight: float
    top_k_weight: float
    csra_weight: float


RECIPES = {
    # one step on the target's features (EAGLE, section 4; EAGLE-2 trains alike)
    "eagle": Recipe(
        num_steps=1,
        regression_weight=1.0,
        classification_weight=0.1,
        top_k_weight=0.0,
        csra_weight=0.0,
    ),
    # N steps on its own predictions, and the target's most probable tokens once more (HASS)
    "hass": Recipe(
        num_steps=3,
        regression_weight=1.0,
        classification_weight=0.1,
        top_k_weight=1.0,
        csra_weight=0.0,
    ),
    # N steps, whose predictions are pulled together (CORAL)
    "coral": Recipe(
        num_steps=3,
        regression_weight=1.0,
        classification_weight=0.1,
        top_k_weight=0.0,
        csra_weight=0.1,
    ),
}


class _FilledFloat(float):
    """A number that a recipe gave."""


class _FilledInt(int):
    """A whole number that a recipe gave."""


def fill(settings: Any, recipe: str) -> None:
    """Give settings a recipe's values where there are none, or those that another recipe gave.

    What a recipe gave is known by its type, which `dataclasses.replace` hands on.
    """
    for name, value in RECIPES[recipe]._asdict().items():
        found = getattr(settings, name)
        if found is None or isinstance(found, _FilledFloat | _FilledInt):
            filled = _FilledInt(value) if isinstance(value, int) else _FilledFloat(value)
            setattr(settings, name, filled)


def plain(value: Any) -> Any:
    """A number of a recipe as any other; everything else as it is."""
    if isinstance(value, _FilledInt):
        return int(value)
    return float(value) if isinstance(value, _FilledFloat) else value
