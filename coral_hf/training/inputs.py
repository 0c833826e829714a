"""What a trainer is given: checked once, when it is made, and datasets read as rows of token ids.

In: the arguments of a trainer: models, settings, a tokenizer, conversations, rows of token ids, or
a feature cache. Out: the tokenizer, rows that the collator takes, or a ValueError that says what to
pass.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, ProcessorMixin, Trainer
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..target import max_positions, text_config
from .arguments import RowArguments
from .data import pack_dataset, share_prompts
from .data.dataset import check_rows, prepare_dataset
from .features import CachedFeatures

# settings and arguments of every `Trainer` that ours never read, with the value that is none
UNREAD: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the losses compare with the target's own probabilities"),
    "neftune_noise_alpha": (None, "`feature_noise` is the noise of a drafter's inputs"),
    "use_liger_kernel": (False, "a drafter has no layers that it replaces"),
    "remove_unused_columns": (False, "the collator picks the columns"),
    "compute_loss_func": (None, "the losses are those of `args`"),
    "model_init": (None, "pass `model`, a drafter of its target"),
    "preprocess_logits_for_metrics": (None, "an evaluation returns no predictions"),
}


def check_given(
    models: dict[str, Any], args: Any, kind: type[Any], others: dict[str, Any], read: Sequence = ()
) -> None:
    """Raise a ValueError for models, settings or arguments that mean nothing to a trainer.

    Args:
        models: by name.
        args: what should be settings of this `kind`.
        others: further arguments of `Trainer`, by name.
        read: settings of `UNREAD` that this trainer reads.
    """
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"`{name}` is {_described(model)}, not a model; load it with"
                " `AutoModelForCausalLM.from_pretrained`."
            )
    if not isinstance(args, kind):
        raise ValueError(f"`args` is {_described(args)}; pass `{kind.__name__}`.")
    given = {**vars(args), **others}
    for name, (none, reason) in UNREAD.items():
        value = given.get(name)
        if value not in (None, none) and name not in read:
            raise ValueError(f"`{name}` is {value!r}, which means nothing here: {reason}.")
    if args.device.type == "cpu" and (args.fp16 or args.fp16_full_eval):
        name = "fp16" if args.fp16 else "fp16_full_eval"
        raise ValueError(f"`{name}` is True, but training runs on a CPU; use bf16, or neither.")
    if isinstance(rows := others.get("train_dataset"), Mapping):
        raise ValueError(f"`train_dataset` is {_described(rows)} of {[*rows]}; pass one of them.")


def tokenizer_of(processing_class: Any) -> Tokenizer | None:
    """Return the tokenizer that was passed, also inside of a processor; None where there is none.

    Raises:
        ValueError: for anything else.
    """
    given = processing_class
    if isinstance(given, ProcessorMixin):
        given = getattr(given, "tokenizer", None)
    if processing_class is None or isinstance(given, Tokenizer):
        return given
    raise ValueError(
        f"`processing_class` is {_described(processing_class)}; pass the target's tokenizer, loaded"
        " with `AutoTokenizer`, or a processor that has one."
    )


def _described(given: Any) -> str:
    """Name what was passed: its type, and its value where that is a word."""
    shown = f" ({given!r})" if isinstance(given, str) else ""
    return f"a {type(given).__name__}{shown}"


def prepare_rows(dataset: Any, trainer: Trainer, is_trained: bool = False) -> Any:
    """Return rows of token ids and labels, or a cache of features, checked against the target.

    Args:
        dataset: conversations; rows of token ids, if there is no tokenizer; a cache; several of
            them by name; or None.
        trainer: with the `target` and the `step` of the run.
        is_trained: whether rows may be joined; held-out ones are documents.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: prepare_rows(part, trainer, is_trained) for name, part in dataset.items()}
    args, target = trainer.args, trainer.target.model
    if isinstance(dataset, CachedFeatures):
        if args.packing and is_trained and not dataset.is_packed:
            raise ValueError(
                f"`packing` is True, but each row of the cache in {dataset.folder} is one document;"
                " write the cache with packing, or pass packing=False."
            )
        _check_lengths(dataset.lengths, args.max_length, f"the cache in {dataset.folder}")
        dataset.select(trainer.step.layers(trainer.drafter.config))
        dataset.check_target(target)
        return dataset
    return token_rows(dataset, trainer.processing_class, args, text_config(target), is_trained)


def token_rows(
    dataset: Any,
    tokenizer: Tokenizer | None,
    args: RowArguments,
    text: PreTrainedConfig,
    may_join: bool = False,
) -> Any:
    """Return rows of token ids and labels, of conversations or of rows of token ids.

    Args:
        text: the config of the part of the target that decodes text.
        may_join: whether rows share prompts and are packed, as `args` say.
    """
    vocab_size, max_length = text.vocab_size, args.max_length
    is_path = isinstance(dataset, str | Path)
    if is_path or tokenizer is not None and not hasattr(dataset, "map"):
        raise ValueError(f"`dataset` is {_described(dataset)}; give a `datasets.Dataset`.")
    if tokenizer is None:
        check_rows(dataset, vocab_size)
        # rows of token ids are not cut; a stream is not read
        if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
            batches = dataset.with_format(None).select_columns("input_ids").iter(batch_size=1000)
            lengths = (len(ids) for batch in batches for ids in batch["input_ids"])
            _check_lengths(lengths, max_length, "`dataset`")
    elif not is_joined(dataset):
        # what is cut is counted in a warning
        longest = min(max_length, max_positions(text) or max_length)
        dataset = prepare_dataset(dataset, tokenizer, longest, vocab_size=vocab_size)
    if not may_join or is_joined(dataset):
        return dataset
    # rows of token ids may be padded
    share = args.share_prompts and tokenizer is not None
    return joined_rows(dataset, max_length, share, args.packing)


def is_joined(rows: Any) -> bool:
    """Whether rows were packed, or joined by their prompts, before."""
    return "position_ids" in (getattr(rows, "column_names", None) or ())


def joined_rows(dataset: Any, max_length: int, share: bool, packing: bool) -> Any:
    """Let rows of `prepare_dataset` share prompts, and pack them; a stream is packed alone."""
    if share and isinstance(dataset, Dataset):
        dataset = share_prompts(dataset, max_length)
    return pack_dataset(dataset, max_length) if packing else dataset


def lengths_only(dataset: Any) -> Any:
    """Return what a sampler needs of a dataset: of a feature cache, rows of the same lengths."""
    if isinstance(dataset, CachedFeatures):
        return [{"input_ids": range(length)} for length in dataset.lengths]
    return dataset


def _check_lengths(lengths: Iterable[int], max_length: int, name: str) -> None:
    longest = max(lengths)
    if longest > max_length:
        raise ValueError(
            f"`max_length` is {max_length}, but a row of {name} has {longest} tokens; pass"
            f" max_length={longest}, or shorter rows."
        )
