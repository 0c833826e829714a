"""Settings of a training run, in addition to those of every `Trainer`.

In: settings in Python, or options of a command. Out: `CoralTrainingArguments`; steps and weights
that are not set come from a recipe, such as the values of a published method.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import HfArgumentParser, TrainingArguments

from ..heads.settings import GROUPINGS


class Recipe(NamedTuple):
    """Steps of the unroll and weights of the losses."""

    num_steps: int
    regression_weight: float = 1.0
    classification_weight: float = 0.1
    top_k_weight: float = 0.0
    csra_weight: float = 0.0
    step_decay: float = 1.0
    single_step_share: float = 0.0


RECIPES = {
    # HASS's losses, and in the first part of a run step 1 alone, which learns quicker: near the
    # best of those that we compared, in runs of 1,000 steps or more, in docs/results/schedule.md
    "one_step_first": Recipe(num_steps=3, top_k_weight=1.0, single_step_share=0.3),
    # one step on the target's features (EAGLE, section 4; EAGLE-2 trains alike)
    "eagle": Recipe(num_steps=1),
    # N steps on its own predictions, and the target's most probable tokens once more (HASS)
    "hass": Recipe(num_steps=3, top_k_weight=1.0),
    # N steps, whose predictions are pulled together (CORAL)
    "coral": Recipe(num_steps=3, csra_weight=0.1),
    # N steps without a goal for their hidden states, which gradients pass through, each weighted
    # less than the one before it (EAGLE-3, training-time test)
    "eagle3": Recipe(num_steps=7, regression_weight=0.0, classification_weight=1.0, step_decay=0.8),
    # heads on one feature, whose goal is the text itself, each weighted less than the one before
    # it (Medusa-1, section 2.2.1)
    "medusa": Recipe(num_steps=5, regression_weight=0.0, classification_weight=1.0, step_decay=0.8),
    # the depths of one pass, each trained at a part of the positions of the one before (P-EAGLE)
    "parallel": Recipe(num_steps=8, regression_weight=0.0, classification_weight=1.0),
    # the next N tokens of one feature, whose state gradients pass through (Recurrent Drafter)
    "recurrent": Recipe(num_steps=5, regression_weight=0.0, classification_weight=1.0),
}
CHOICES = {
    "stage": ("drafter", "router", "joint"),
    "grouping": (None, *GROUPINGS[:-1]),
    "recipe": tuple(RECIPES),
    "goal": (None, "distribution", "tokens"),
    "csra_negatives": ("sequence", "batch"),
    "csra_positives": ("steps", "steps_and_target"),
    "csra_gradient": ("all_steps", "later_steps"),
    "loss": ("ce", "kl", "tvd", "tvd++"),
}
MOST_GROUPS = 64  # of a new router, by default
LEAST = {
    **dict.fromkeys(Recipe._fields, 0),
    **dict.fromkeys(("router_weight", "feature_noise", "eval_prompts", "eval_temperature"), 0),
    **dict.fromkeys(("num_steps", "top_k", "eval_prompt_length"), 1),
    **dict.fromkeys(("num_groups", "num_active_groups"), 1),
    **dict.fromkeys(("csra_temperature", "keep_ratio"), 1e-3),
    # nothing predicts the first two tokens of a row
    "max_length": 3,
    # the first token of an answer comes from the prefill, the second from a round of decoding
    "eval_max_new_tokens": 2,
}

MOST = {"keep_ratio": 1, "single_step_share": 1}


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class RowArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with what decides how a dataset becomes rows."""

    max_length: int = _setting(2048, "Tokens after which a conversation is cut.")
    # every trained weight is used in every batch
    ddp_find_unused_parameters: bool | None = _setting(False, "DDP looks for unused parameters.")
    # the `forward` of a drafter does not name the columns of a batch
    remove_unused_columns: bool = _setting(False, "Leave it: the collator picks the columns.")
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])

    def __post_init__(self):
        super().__post_init__()
        for one in fields(self):
            name, value = one.name, getattr(self, one.name)
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(f"`{name}` is {value!r}; use one of {CHOICES[name]}.")
            if name in LEAST and value is not None:
                least, most = LEAST[name], MOST.get(name, math.inf)
                kind = Integral if one.type in (int, int | None) else Real
                is_fit = isinstance(value, kind) and math.isfinite(value)
                if not (is_fit and least <= value <= most):
                    bounds = f"{least} or more" if name not in MOST else f"{least} to {most}"
                    whole = "a whole number, " if kind is Integral else ""
                    raise ValueError(f"`{name}` is {value!r}; use {whole}{bounds}.")

    def __getstate__(self) -> dict[str, Any]:
        # `Trainer` pickles its arguments into every checkpoint, and uploads them
        return {**vars(self), "hub_token": None}


@dataclass
class AssistantTrainingArguments(RowArguments):
    """[`~transformers.TrainingArguments`] of a small language model that shall draft."""

    loss: str = _setting("kl", "'ce' on tokens, or 'kl', 'tvd', 'tvd++' on probabilities.")

    @property
    def method(self) -> dict[str, Any]:
        """How the assistant is trained, as plain values by name."""
        return {"stage": "assistant", "loss": self.loss}


@dataclass
class CoralTrainingArguments(RowArguments):
    """[`~transformers.TrainingArguments`] with the settings of CORAL.

    L = Σ_steps decay^(step - 1) (w_reg L_reg + w_cls L_cls + w_topk L_topk) + w_csra L_csra

    The number of steps and the weights are those of `recipe` where they are not set: `resolved`
    has them all.

    Raises:
        ValueError: for settings that contradict each other, such as CSRA with a single step.
    """

    stage: str = _setting("drafter", "'drafter'; its 'router' alone; both: 'joint'.")
    recipe: str = _setting(
        "one_step_first",
        "The method whose steps and weights count where none are set: 'one_step_first', 'coral',"
        " 'eagle', 'hass' of CORAL drafters, 'eagle3', 'medusa', 'parallel', 'recurrent' of those"
        " families.",
    )
    num_steps: int | None = _setting(None, "Steps of the unroll (N); Medusa heads.")
    regression_weight: float | None = _setting(None, "Weight of the smooth L1 loss on features.")
    classification_weight: float | None = _setting(None, "Weight of the cross-entropy on tokens.")
    top_k_weight: float | None = _setting(None, "The same for the target's top k tokens (HASS).")
    top_k: int = _setting(10, "Tokens of the top-k loss at each position.")
    csra_weight: float | None = _setting(None, "Weight of cross-step representation alignment.")
    step_decay: float | None = _setting(None, "Weight of a step's losses over the step before it.")
    single_step_share: float | None = _setting(None, "Share of a run that trains step 1 alone.")
    goal: str | None = _setting(
        None, "The target's 'distribution', or the text's 'tokens' (drafters with an own LM head)."
    )
    csra_temperature: float = _setting(0.07, "Temperature of CSRA.")
    csra_negatives: str = _setting(
        "sequence", "Negatives of CSRA: of the same 'sequence', or of the device's whole 'batch'."
    )
    csra_positives: str = _setting(
        "steps", "Positives of CSRA: the other 'steps', or 'steps_and_target', its feature too."
    )
    csra_gradient: str = _setting(
        "all_steps", "'all_steps' learn from CSRA, or the 'later_steps' but not the first."
    )
    keep_ratio: float = _setting(0.8, "Positions that a depth keeps of the one before (P-EAGLE).")
    feature_noise: float = _setting(0.0, "Largest uniform noise on input features (EAGLE: 0.1).")
    num_groups: int | None = _setting(None, "Groups of a new router: 64 or fewer by default.")
    num_active_groups: int | None = _setting(None, "Of them, read at a time: an eighth by default.")
    grouping: str | None = _setting(
        None, "Groups of a new router: 'contiguous', of like 'frequency', or by default 'kmeans'."
    )
    router_weight: float = _setting(0.1, "Weight of the router's loss in the joint stage.")
    packing: bool = _setting(False, "Pack several documents into each row of `max_length`.")
    share_prompts: bool = _setting(True, "Rows of a conversation share a row with their prompt.")
    eval_prompts: int = _setting(32, "Held-out prompts that an evaluation decodes, or 0.")
    eval_max_new_tokens: int = _setting(64, "Tokens of each of these answers at most.")
    eval_prompt_length: int = _setting(16, "Tokens of a plain text that are its prompt.")
    eval_temperature: float = _setting(0.0, "Temperature of these answers; 0 is greedy.")

    def __post_init__(self):
        super().__post_init__()
        active, most = self.num_active_groups or 0, self.num_groups or MOST_GROUPS
        if active > most:
            raise ValueError(f"`num_active_groups` is {active}; use 1 to `num_groups` = {most}.")
        if self.stage in ("drafter", "joint"):
            self._check_losses()

    @property
    def resolved(self) -> Recipe:
        """Steps and weights of the run: those that were set, the others from the recipe."""
        found = {name: getattr(self, name) for name in Recipe._fields}
        given = {name: value for name, value in found.items() if value is not None}
        return RECIPES[self.recipe]._replace(**given)

    def steps_alone(self, length: int) -> int:
        """Count the optimizer steps of `length`, from the first on, that train step 1 alone."""
        if self.stage not in ("drafter", "joint"):
            return 0
        return round(self.resolved.single_step_share * length)

    def steps_at(self, number: int, length: int) -> int:
        """Count the steps of the unroll at optimizer step `number`, from 0, of `length`."""
        return 1 if number < self.steps_alone(length) else self.resolved.num_steps

    def _check_losses(self) -> None:
        recipe = self.resolved
        weight = recipe.csra_weight
        if recipe.num_steps == 1 and weight:
            raise ValueError(f"`csra_weight` is {weight}, but `num_steps` 1: use more, or no CSRA.")
        if recipe.single_step_share == 1 and weight:
            raise ValueError(
                f"`csra_weight` is {weight}, but `single_step_share` 1: use less, or no CSRA."
            )
        if not (recipe.regression_weight or recipe.classification_weight or recipe.top_k_weight):
            raise ValueError(
                "`regression_weight`, `classification_weight` and `top_k_weight` are all 0, so the"
                " drafter would not learn from its target; set one of them."
            )

    @property
    def method(self) -> dict[str, Any]:
        """What is trained and how, as plain values by name."""
        recipe = {"recipe": self.recipe, "weights": self.resolved._asdict()}
        return {"stage": self.stage, **(recipe if self.stage in ("drafter", "joint") else {})}

    def to_dict(self) -> dict[str, Any]:
        """See [`~transformers.TrainingArguments.to_dict`]; with the values of the recipe."""
        return {**super().to_dict(), **self.resolved._asdict()}


def parse_arguments(
    output_dir: str | Path,
    options: Sequence[str],
    kind: type[RowArguments] = CoralTrainingArguments,
    **fields: Any,
) -> Any:
    """Parse options of the command line, such as `--num_steps 3`; `fields` replace them."""
    # the usage that argparse writes would list two hundred options
    usage = f"[options of {kind.__name__}]"
    parser = HfArgumentParser(kind, prog="coral-hf", usage=usage, allow_abbrev=False)
    # pinned memory without CUDA makes torch warn
    has_cuda = torch.cuda.is_available()
    parser.set_defaults(output_dir=output_dir, report_to="none", dataloader_pin_memory=has_cuda)
    return kind(**{**vars(parser.parse_args(options)), **fields})
