"""A whole dataset as tokens and labels.

In: rows of any layout, a tokenizer. Out: the columns `input_ids`, `attention_mask`, `labels`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .encoding import IGNORED, Encoded, tokenize
from .messages import Row, layout_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Data = TypeVar("Data", "Dataset", "IterableDataset")

logger = logging.get_logger(__name__)


def prepare_dataset(
    dataset: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, num_proc: int | None = None
) -> Data:
    """Tokenize a dataset to the columns `input_ids`, `attention_mask` and `labels`.

    Rows that are cut before their first trained token are dropped. A stream is read lazily.
    """
    import datasets

    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("`dataset` has no rows; check its path, its split and its filters.")
    columns = dataset.column_names or list(first)  # a stream may not know its columns
    layout_of(dict.fromkeys(columns, True))
    given = {"tokenizer": tokenizer, "max_length": max_length}
    how: dict[str, Any] = {"with_indices": True, "remove_columns": columns, "fn_kwargs": given}
    plain = dataset.with_format(None)  # lists, not tensors
    if isinstance(plain, datasets.IterableDataset):
        return plain.map(_tokenize_numbered, **how).filter(_has_labels)
    rows = plain.map(_tokenize_numbered, **how, num_proc=num_proc, desc="Tokenizing")
    trained = rows.filter(_has_labels, num_proc=num_proc, desc="Dropping rows without labels")
    dropped = len(rows) - len(trained)
    fact = f"{dropped} of {len(rows)} rows have no trained token in their first {max_length}"
    if dropped == len(rows):
        raise ValueError(f"{fact}, so nothing is left; raise `max_length`.")
    if dropped:
        logger.warning(f"{fact} and are dropped; raise `max_length` to keep more.")
    return trained


def _tokenize_numbered(
    row: Row, index: int, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    try:
        return tokenize(row, tokenizer, max_length)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"Row {index}: {error}") from error


def _has_labels(row: Row) -> bool:
    return any(label != IGNORED for label in row["labels"])
