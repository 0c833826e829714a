"""Datasets of the trainer, from whatever it is given.

In: conversations, rows of tokens, or a feature cache. Out: rows that the collator takes.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from ..target import Target, text_config
from .arguments import CoralTrainingArguments
from .data import pack_dataset, prepare_dataset
from .data.vocabulary import check_rows
from .features import CachedFeatures


def training_rows(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    args: CoralTrainingArguments,
    target: Target,
    packing: bool = False,
) -> Any:
    """Rows of a dataset as token ids and labels, or of a cache of this target's features.

    Without a tokenizer, rows hold token ids already.
    """
    vocab_size = text_config(target.model).vocab_size
    if isinstance(dataset, CachedFeatures):
        _check_cache(dataset, args, packing)
        dataset.check_target(target.model)
        return dataset
    if tokenizer is None:
        check_rows(dataset, vocab_size)
        _check_lengths(dataset, args.max_length)
    elif not hasattr(dataset, "map"):
        raise ValueError(
            f"`dataset` is a {type(dataset).__name__}; give a `datasets.Dataset`, such as"
            " `Dataset.from_list(rows)`."
        )
    elif "position_ids" not in (dataset.column_names or ()):  # else it was packed before
        dataset = prepare_dataset(dataset, tokenizer, args.max_length, vocab_size=vocab_size)
    is_packed = "position_ids" in (getattr(dataset, "column_names", None) or ())
    return pack_dataset(dataset, args.max_length) if packing and not is_packed else dataset


def lengths_only(dataset: Any) -> Any:
    """What samplers read of a dataset: of a feature cache the lengths of its rows alone."""
    if isinstance(dataset, CachedFeatures):
        return [{"input_ids": range(length)} for length in dataset.lengths]
    return dataset


def _check_lengths(dataset: Any, max_length: int) -> None:
    """Refuse rows of tokens, which nobody cuts, beyond the limit; streams are not read."""
    import datasets

    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
        return
    batches = dataset.with_format(None).select_columns("input_ids").iter(batch_size=1000)
    longest = max(len(ids) for batch in batches for ids in batch["input_ids"])
    if longest > max_length:
        raise ValueError(
            f"`max_length` is {max_length}, but a row of `dataset` has {longest} tokens; cut the"
            f" rows, pass max_length={longest}, or the tokenizer, with which rows are cut."
        )


def _check_cache(dataset: CachedFeatures, args: CoralTrainingArguments, packing: bool) -> None:
    if packing and not dataset.is_packed:
        raise ValueError(
            f"`packing` is True, but each row of the cache in {dataset.folder} is one document;"
            " write the cache with packing, or pass packing=False."
        )
    longest = max(dataset.lengths)
    if longest > args.max_length:
        raise ValueError(
            f"`max_length` is {args.max_length}, but the cache in {dataset.folder} has rows of up"
            f" to {longest} tokens; pass max_length={longest}, or write it with"
            f" max_length {args.max_length}."
        )
