"""A whole dataset as tokens and labels.

In: rows of any layout, a tokenizer. Out: the columns `input_ids`, `attention_mask`, `labels`; what
was cut, dropped or empty is counted in a warning each.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import transformers
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .encoding import IGNORED, Encoded, cut, encode
from .messages import Row, count_empty_turns, layout_of
from .vocabulary import check_ids, check_vocabulary

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

Data = TypeVar("Data", "Dataset", "IterableDataset")

logger = logging.get_logger(__name__)

COLUMNS = {"input_ids": "int32", "attention_mask": "int8", "labels": "int32"}
NOTES = {"num_trained": "int64", "num_lost": "int64", "num_empty": "int64", "problem": "string"}


def prepare_dataset(
    dataset: Data,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    num_proc: int | None = None,
    vocab_size: int | None = None,
) -> Data:
    """Tokenize a dataset to the columns `input_ids`, `attention_mask` and `labels`.

    Rows that are cut before their first trained token are dropped. A stream is read lazily. What
    was tokenized before is read from the cache of `datasets`, unless code or settings changed.

    Args:
        vocab_size: of the target, to refuse token ids that it does not have.

    Raises:
        ValueError: for rows that cannot be read, naming the first and their number; of a stream
            when the row is reached.
    """
    import datasets

    plain = dataset.with_format(None)  # lists, not tensors
    first = next(iter(plain), None)
    if first is None:
        raise ValueError("`dataset` has no rows; check its path, its split and its filters.")
    columns = dataset.column_names or list(first)  # a stream may not know its columns
    layout_of(dict.fromkeys(columns, True))
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size)
    given = {"tokenizer": tokenizer, "max_length": max_length, "vocab_size": vocab_size}
    if isinstance(plain, datasets.IterableDataset):
        return plain.map(
            _tokenize_numbered, with_indices=True, remove_columns=columns, fn_kwargs=given
        ).filter(_has_labels)
    _tokenize_numbered(first, 0, **given)  # what is wrong with all rows is said at once
    rows = plain.map(
        _tokenize_noted,
        fn_kwargs={**given, "code": code_version()},
        remove_columns=columns,
        features=_features(),
        num_proc=num_proc,
        desc="Tokenizing",
    )
    return _checked(rows, max_length)


@functools.cache
def code_version() -> str:
    """SHA-256 of this folder's code and the version of transformers.

    `datasets` knows a function by its name alone, so its cache would outlive an edit.
    """
    files = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join([*files, transformers.__version__.encode()])).hexdigest()


def _features() -> Features:
    import datasets

    lists = {name: datasets.Sequence(datasets.Value(kind)) for name, kind in COLUMNS.items()}
    return datasets.Features(
        {**lists, **{name: datasets.Value(kind) for name, kind in NOTES.items()}}
    )


def _tokenize_numbered(
    row: Row,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocab_size: int | None,
) -> Encoded:
    try:
        return cut(_encode_checked(row, tokenizer, vocab_size), max_length)
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error


def _encode_checked(
    row: Row, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None
) -> Encoded:
    encoded = encode(row, tokenizer)
    if vocab_size is not None:
        check_ids(encoded["input_ids"], vocab_size)
    return encoded


def _tokenize_noted(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocab_size: int | None,
    code: str,  # read by the cache alone
) -> dict[str, Any]:
    """A row and its NOTES; no error, so that all bad rows are counted."""
    try:
        whole = _encode_checked(row, tokenizer, vocab_size)
    except ValueError as error:
        notes = {"num_trained": 0, "num_lost": 0, "num_empty": 0, "problem": str(error)}
        return {**{name: [] for name in COLUMNS}, **notes}
    encoded = cut(whole, max_length)
    return {
        **encoded,
        "num_trained": sum(label != IGNORED for label in encoded["labels"]),
        "num_lost": len(whole["input_ids"]) - len(encoded["input_ids"]),
        "num_empty": count_empty_turns(row),
        "problem": "",
    }


def _has_labels(row: Row) -> bool:
    return any(label != IGNORED for label in row["labels"])


def _checked(rows: Dataset, max_length: int) -> Dataset:
    """Raise for rows that cannot be read, warn of the rest, drop rows without labels."""
    notes = rows.select_columns([*NOTES]).to_pandas()
    bad = notes.index[notes["problem"] != ""]
    if len(bad):
        raise ValueError(
            f"Row {bad[0]}: {notes['problem'][bad[0]]} Of {len(rows)} rows, {len(bad)} cannot be"
            " read; mend them or drop them with `dataset.filter` (docs/data.md)."
        )
    kept = notes.index[notes["num_trained"] > 0]
    _warn_of_rows(notes, max_length)
    trained = rows.select_columns([*COLUMNS])
    return trained if len(kept) == len(rows) else trained.select(kept)


def _warn_of_rows(notes: Any, max_length: int) -> None:
    """Say how many rows were cut, empty or dropped; an error if none is left."""
    lost, empty = notes["num_lost"], notes["num_empty"]
    of_rows = f"of {len(notes)} rows"
    if (lost > 0).any():
        logger.warning(
            f"Cut to `max_length` = {max_length}: {(lost > 0).sum()} {of_rows}; {lost.sum()} tokens"
            f" are lost, {lost.max()} of one row."
        )
    if (empty > 0).any():
        logger.warning(
            f"With empty turns: {(empty > 0).sum()} {of_rows}, the first is row {empty.argmax()};"
            " they are trained as they stand, or drop them with `dataset.filter`."
        )
    num_dropped = (notes["num_trained"] == 0).sum()
    fact = f"{num_dropped} {of_rows} have no trained token in their first {max_length}"
    if num_dropped == len(notes):
        raise ValueError(f"{fact}, so nothing is left; raise `max_length`.")
    if num_dropped:
        logger.warning(f"{fact} and are dropped; raise `max_length` to keep more.")
