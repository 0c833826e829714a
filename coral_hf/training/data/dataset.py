"""Tokenization of a whole dataset, and checks that its token ids are the target's.

In: rows of any layout, a tokenizer. Out: the columns `input_ids`, `attention_mask`, `labels`; rows
that were cut, dropped or empty are counted in a warning each. Ids outside the target's vocabulary
are an error: on a GPU they are an assertion that names nothing.
"""

import functools
from pathlib import Path
from typing import Any, TypeVar

import datasets
import transformers
from datasets import Dataset, IterableDataset
from pandas import DataFrame
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from ...identity import digest, file_digest
from ...measure import chat
from ...target import text_config
from .encoding import IGNORED, check_ids, cut, encode

Data = TypeVar("Data", Dataset, IterableDataset)

logger = logging.get_logger(__name__)

IDS, MASK = datasets.Sequence(datasets.Value("int32")), datasets.Sequence(datasets.Value("int8"))
COLUMNS = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
NOTES = dict.fromkeys(("source", "num_tokens", "num_trained", "num_lost"), datasets.Value("int64"))
NOTES |= {"problem": datasets.Value("string")}


def prepare_dataset(
    dataset: Data,
    tokenizer: Tokenizer,
    max_length: int,
    num_proc: int | None = None,
    vocab_size: int | None = None,
) -> Data:
    """Tokenize a dataset to the columns `input_ids`, `attention_mask` and `labels`.

    A row becomes one or several, see `tokenize`; those that are cut before their first trained
    token are dropped. A stream is read lazily. Rows that were tokenized before come from the cache
    of `datasets`, unless code or settings changed.

    Args:
        dataset: rows of any layout.
        tokenizer: the target's.
        max_length: tokens after which a row is cut.
        num_proc: processes that tokenize.
        vocab_size: of the target, to refuse token ids that it does not have.

    Raises:
        ValueError: for rows that cannot be read, naming the first and their number; of a stream
            when the row is reached.
    """
    if isinstance(dataset, dict):
        raise ValueError(f"`dataset` is a {type(dataset).__name__} of {[*dataset]}; pass one.")
    plain = dataset.with_format(None)  # lists, not tensors
    first = next(iter(plain), None)
    if first is None:
        raise ValueError("`dataset` has no rows; check its path, its split and its filters.")
    # fail at once where every row would
    batch = {name: [value] for name, value in first.items()}
    _tokenize(batch, [0], tokenizer, max_length, vocab_size, is_strict=True)
    rows = tokenize_rows(plain, tokenizer, max_length, num_proc, vocab_size)
    if isinstance(rows, IterableDataset):
        return rows.filter(lambda row: row["num_trained"]).select_columns([*COLUMNS])
    return _drop_untrained(rows, len(plain), max_length)


def tokenize_rows(
    dataset: Data,
    tokenizer: Tokenizer,
    max_length: int,
    num_proc: int | None = None,
    vocab_size: int | None = None,
) -> Data:
    """Tokenize a dataset to COLUMNS and NOTES; a stream raises a bad row when it is reached."""
    known = {"tokenizer": tokenizer, "max_length": max_length, "vocab_size": vocab_size}
    known |= {"code": code_version(), "is_strict": isinstance(dataset, IterableDataset)}
    options: dict[str, Any] = {"batched": True, "with_indices": True, "fn_kwargs": known}
    options["remove_columns"] = columns_of(dataset)
    if isinstance(dataset, IterableDataset):
        return dataset.map(_tokenize, batch_size=1, **options)
    features = datasets.Features({**COLUMNS, **NOTES})
    options |= {"features": features, "desc": "Tokenizing", "num_proc": num_proc}
    return dataset.with_format(None).map(_tokenize, **options)


def columns_of(dataset: Any) -> list[str]:
    """Name the columns of a dataset; a stream may not know its own."""
    return dataset.column_names or list(next(iter(dataset)))


def notes_of(rows: Dataset) -> DataFrame:
    """Return what is noted of tokenized rows."""
    return rows.select_columns([*NOTES]).to_pandas()


@functools.cache
def code_version() -> str:
    """Hash the code that makes rows, and the version of transformers.

    `datasets` knows a function by its name alone, so its cache would outlive an edit.
    """
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(chat.__file__)]
    return digest([*map(file_digest, files), transformers.__version__])


def _tokenize(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: Tokenizer,
    max_length: int,
    vocab_size: int | None,
    code: str = "",
    is_strict: bool = False,
) -> dict[str, list]:
    """See `tokenize_rows`; a batch is given by column, and `code` for the cache alone.

    An error is noted in a row of its own, so that all bad rows are counted; `is_strict` raises it.
    """
    found: dict[str, list] = {name: [] for name in (*COLUMNS, *NOTES)}
    for index, *values in zip(indices, *batch.values(), strict=True):
        problem, wholes = "", [{"input_ids": list[int](), "labels": list[int]()}]
        try:
            row = dict(zip(batch, values, strict=True))
            wholes = encode(row, tokenizer, max_length, vocab_size)
        except ValueError as error:
            problem = f"Row {index}: {error}"
            if is_strict:
                raise ValueError(problem) from error
        for whole in wholes:
            part: dict[str, Any] = {**cut(whole, max_length), "source": index, "problem": problem}
            part["num_tokens"] = len(part["input_ids"])
            part["num_trained"] = sum(label != IGNORED for label in part["labels"])
            part["num_lost"] = len(whole["input_ids"]) - part["num_tokens"]
            for name, value in part.items():
                found[name].append(value)
    return found


def _drop_untrained(rows: Dataset, num_rows: int, max_length: int) -> Dataset:
    """Drop tokenized rows without labels, count them and those that were cut; refuse bad rows.

    Args:
        rows: of `tokenize_rows`.
        num_rows: before they were tokenized.
        max_length: that they were cut to.
    """
    notes = notes_of(rows)
    bad, of_rows = notes.problem[notes.problem != ""], f"of {num_rows} rows"
    if len(bad):
        raise ValueError(
            f"{bad.iloc[0]} Of {num_rows} rows, {len(bad)} cannot be read; repair them or drop them"
            " with `dataset.filter` (docs/use/data.md)."
        )
    lost = notes.num_lost
    if lost.any():
        logger.warning(
            f"Cut to `max_length` = {max_length}: {notes.source[lost > 0].nunique()} {of_rows};"
            f" {lost.sum()} tokens are lost, {lost.max()} of one row."
        )
    kept = notes.index[notes.num_trained > 0]
    if len(rows) > num_rows:
        of_rows = f"of {len(rows)} rows, made of {num_rows},"
    dropped = f"{len(rows) - len(kept)} {of_rows} have no trained token in their first {max_length}"
    if not len(kept):
        raise ValueError(f"{dropped}, so nothing is left; raise `max_length`.")
    if len(kept) < len(rows):
        logger.warning(f"{dropped} and are dropped; raise `max_length` to keep more.")
    return rows.select_columns([*COLUMNS]).select(kept)


def warn_of_other_ends(tokenizer: Tokenizer, target: PreTrainedModel) -> None:
    """Warn of a tokenizer whose BOS or EOS is not the target's.

    Its ids may all be within the vocabulary and still be those of another target.
    """
    for name in ("bos_token_id", "eos_token_id"):
        own, known = getattr(tokenizer, name), set[Any]()
        for config in (text_config(target), target.generation_config):
            found = getattr(config, name, None)  # chat models have several ends
            known |= {*found} if isinstance(found, list) else {found} - {None}
        if own is not None and known and own not in known:
            expected = " or ".join(map(str, sorted(known)))
            which = f"The tokenizer's {name[:3].upper()} is token {own}, the target's {expected}"
            logger.warning(f"{which}: it may be another target's. Pass the target's own.")


def check_rows(dataset: Any, vocab_size: int) -> None:
    """Raise a ValueError naming the first row of `input_ids` outside the vocabulary.

    Only a `datasets.Dataset` is read; a stream can be read only once.
    """
    if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
        rows = dataset.select_columns("input_ids").with_format("numpy")
        for number, row in enumerate(rows):
            check_ids(row["input_ids"], vocab_size, f"Row {number}: ")
