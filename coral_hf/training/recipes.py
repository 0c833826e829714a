"""Recipes: the settings of published trainings, by name, each of them open to change."""

from typing import NamedTuple


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
