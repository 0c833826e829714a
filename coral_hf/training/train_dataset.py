"""Preparation of the datasets that a trainer is given.

In: conversations, rows of token ids, or a feature cache. Out: rows that the collator takes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Trainer

from ..target import max_positions, text_config
from .arguments import CoralTrainingArguments, RowArguments
from .data import pack_dataset, share_prompts
from .data.dataset import check_rows, prepare_dataset
from .features import CachedFeatures


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
    tokenizer, args = trainer.processing_class, trainer.args
    if isinstance(dataset, CachedFeatures):
        if args.packing and is_trained and not dataset.is_packed:
            raise ValueError(
                f"`packing` is True, but each row of the cache in {dataset.folder} is one document;"
                " write the cache with packing, or pass packing=False."
            )
        _check_lengths(dataset.lengths, args.max_length, f"the cache in {dataset.folder}")
        dataset.select(trainer.step.layers(trainer.drafter.config))
        dataset.check_target(trainer.target.model)
        return dataset
    read = trained_rows if is_trained else token_rows
    return read(dataset, tokenizer, args, text_config(trainer.target.model))


def token_rows(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    args: RowArguments,
    text: PreTrainedConfig,
) -> Any:
    """Return rows of token ids and labels, of conversations or of rows of token ids.

    `text`: the config of the part of the target that decodes text.
    """
    vocab_size, max_length = text.vocab_size, args.max_length
    if isinstance(dataset, str | Path):
        raise ValueError(
            f"`dataset` is a {type(dataset).__name__} ({str(dataset)!r}); read it with"
            " `coral_hf.training.data.load_conversations`."
        )
    if tokenizer is None:
        check_rows(dataset, vocab_size)
        # rows of token ids are not cut; a stream is not read
        if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
            batches = dataset.with_format(None).select_columns("input_ids").iter(batch_size=1000)
            lengths = (len(ids) for batch in batches for ids in batch["input_ids"])
            _check_lengths(lengths, max_length, "`dataset`")
    elif not hasattr(dataset, "map"):
        raise ValueError(f"`dataset` is a {type(dataset).__name__}; give a `datasets.Dataset`.")
    elif "position_ids" not in (dataset.column_names or ()):  # else it was packed before
        # what is cut is counted in a warning
        longest = min(max_length, max_positions(text) or max_length)
        sizes = {"vocab_size": vocab_size, "ignore_columns": args.ignore_columns or ()}
        dataset = prepare_dataset(dataset, tokenizer, longest, **sizes)
    return dataset


def trained_rows(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    args: CoralTrainingArguments,
    text: PreTrainedConfig,
) -> Any:
    """Return rows as [`token_rows`] does, joined as `args` say."""
    rows = token_rows(dataset, tokenizer, args, text)
    if "position_ids" in (getattr(rows, "column_names", None) or ()):
        return rows
    # rows of token ids may be padded
    share = args.share_prompts and tokenizer is not None
    return joined_rows(rows, args.max_length, share, args.packing)


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
