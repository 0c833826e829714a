"""What a trainer cannot take: checked once, when it is made, with the name of what was passed.

In: the arguments of a trainer. Out: the tokenizer, or a ValueError that says what to pass.
"""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .arguments import CoralTrainingArguments, RowArguments

# settings of every `Trainer` that the losses of a drafter never read, with the value that is none
UNREAD: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the losses compare with the target's own probabilities"),
    "neftune_noise_alpha": (None, "`feature_noise` is the noise of a drafter's inputs"),
    "remove_unused_columns": (False, "the collator picks the columns"),
    "batch_eval_metrics": (False, "an evaluation computes its own metrics"),
    "include_for_metrics": ([], "an evaluation returns no predictions"),
}
# arguments of every `Trainer` that are never called
UNCALLED = {
    "compute_loss_func": "the losses are those of `args`",
    "model_init": "pass `model`, a drafter of its target",
    "preprocess_logits_for_metrics": "an evaluation returns no predictions",
}


def check_given(model: Any, target_model: Any, args: Any, others: Mapping[str, Any]) -> None:
    """Raise a ValueError for a model, a target, settings or arguments that mean nothing here.

    Args:
        others: further arguments of `Trainer`, by name.
    """
    drafter_remedy = "load the drafter with `AutoModel.from_pretrained`"
    remedies = {"model": drafter_remedy, "target_model": "load it with `AutoModelForCausalLM`"}
    for name, given in {"model": model, "target_model": target_model}.items():
        if not isinstance(given, nn.Module | PeftModel):
            raise ValueError(f"`{name}` is {described(given)}, not a model; {remedies[name]}.")
    check_settings(args, others, CoralTrainingArguments, UNREAD)


def check_settings(
    args: Any,
    others: Mapping[str, Any],
    kind: type[RowArguments],
    unread: Mapping[str, tuple[Any, str]],
) -> None:
    """Raise a ValueError for settings of another kind, or that mean nothing.

    Args:
        others: further arguments of `Trainer`, by name.
        unread: settings that are never read, see `UNREAD`.
    """
    if not isinstance(args, kind):
        raise ValueError(f"`args` is {described(args)}; pass `{kind.__name__}`.")
    for name, (none, reason) in unread.items():
        value = getattr(args, name, none)
        if value is not None and value != none:
            raise ValueError(f"`{name}` is {value!r}, which means nothing here: {reason}.")
    for name, reason in UNCALLED.items():
        if others.get(name) is not None:
            raise ValueError(f"`{name}` is never called: {reason}; leave it out.")
    if args.device.type == "cpu" and (args.fp16 or args.fp16_full_eval):
        name = "fp16" if args.fp16 else "fp16_full_eval"
        raise ValueError(f"`{name}` is True, but training runs on a CPU; use bf16, or neither.")
    train_dataset = others.get("train_dataset")
    if isinstance(train_dataset, Mapping):
        raise ValueError(
            f"`train_dataset` is a {type(train_dataset).__name__} of the parts {[*train_dataset]};"
            " pass one of them."
        )


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that was passed, also inside of a processor; None where there is none.

    Raises:
        ValueError: for anything else.
    """
    given = processing_class
    if isinstance(given, ProcessorMixin):
        given = getattr(given, "tokenizer", None)
    if given is None and processing_class is None or isinstance(given, PreTrainedTokenizerBase):
        return given
    raise ValueError(
        f"`processing_class` is {described(processing_class)}; pass the target's tokenizer, loaded"
        " with `AutoTokenizer`, or a processor that has one."
    )


def described(given: Any) -> str:
    """Name what was passed: its type, and its value where that is a word."""
    shown = f" ({given!r})" if isinstance(given, str) else ""
    return f"a {type(given).__name__}{shown}"
