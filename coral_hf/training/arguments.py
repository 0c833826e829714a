"""The settings of a CORAL training run, beside those of every `Trainer`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

STAGES = ("drafter", "router")
NEGATIVES = ("batch", "sequence")
# a round of decoding follows the token of the prompt's pass, so an answer needs two
LEAST = {
    "eval_prompts": 0,
    "eval_max_new_tokens": 2,
    "eval_prompt_length": 1,
    "eval_temperature": 0.0,
}


@dataclass
class CoralTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with the settings of CORAL.

    L = Σ_steps (w_reg L_reg + w_cls L_cls) + w_csra L_csra

    Raises:
        ValueError: for settings that contradict each other, such as CSRA with a single step.
    """

    stage: str = field(
        default="drafter",
        metadata={
            "help": "'drafter' trains the drafter, 'router' its router with the rest frozen."
        },
    )
    num_steps: int = field(
        default=3, metadata={"help": "Steps of the unroll (N of CORAL and HASS)."}
    )
    regression_weight: float = field(
        default=1.0, metadata={"help": "Weight of the smooth L1 loss on features."}
    )
    classification_weight: float = field(
        default=0.1, metadata={"help": "Weight of the soft cross-entropy on tokens."}
    )
    csra_weight: float = field(
        default=0.1, metadata={"help": "Weight of cross-step representation alignment."}
    )
    csra_temperature: float = field(default=0.07, metadata={"help": "Temperature of CSRA."})
    csra_negatives: str = field(
        default="batch",
        metadata={
            "help": "What CSRA tells a feature from: all of the 'batch' of a device, whose cost"
            " grows with the square of its tokens, or its own 'sequence'."
        },
    )
    num_groups: int = field(
        default=16, metadata={"help": "Groups of the vocabulary of a new router."}
    )
    num_active_groups: int = field(
        default=2, metadata={"help": "Groups that the routed head reads at a time."}
    )
    max_length: int = field(
        default=2048, metadata={"help": "Tokens after which a conversation is cut."}
    )
    eval_prompts: int = field(
        default=32,
        metadata={"help": "Held-out prompts that an evaluation answers with the drafter; 0: none."},
    )
    eval_max_new_tokens: int = field(
        default=64, metadata={"help": "Tokens of each of these answers at most."}
    )
    eval_prompt_length: int = field(
        default=16, metadata={"help": "Tokens of a plain text that are its prompt."}
    )
    eval_temperature: float = field(
        default=0.0, metadata={"help": "Temperature of these answers; 0 is greedy."}
    )
    plots: bool = field(
        default=True, metadata={"help": "Draw what was logged into `output_dir`, as PNG files."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.stage not in STAGES:
            raise ValueError(f"`stage` is {self.stage!r}; use one of {STAGES}.")
        if self.csra_negatives not in NEGATIVES:
            raise ValueError(
                f"`csra_negatives` is {self.csra_negatives!r}; use one of {NEGATIVES}."
            )
        if self.num_steps < 1:
            raise ValueError(f"`num_steps` is {self.num_steps}; use at least 1.")
        if self.num_steps == 1 and self.csra_weight != 0 and self.stage == "drafter":
            raise ValueError(
                f"`csra_weight` is {self.csra_weight}, but with `num_steps` 1 there are no steps to"
                " align; use num_steps of at least 2, or csra_weight=0."
            )
        if self.csra_temperature <= 0:
            raise ValueError(f"`csra_temperature` is {self.csra_temperature}; use a value above 0.")
        for name in ("regression_weight", "classification_weight", "csra_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; use 0 or more.")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; use {least} or more.")
