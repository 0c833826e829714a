"""Tokenization of a whole dataset, and checks that its token ids are the target's.

In: rows of any layout, a tokenizer. Out: the columns `input_ids`, `attention_mask`, `labels`; rows
that were cut, dropped or empty are counted in a warning each. Ids outside the target's vocabulary
are an error: on a GPU they are an assertion that names nothing.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow.compute as arrow
import transformers
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from ...identity import digest, file_digest
from ...measure import chat
from ...target import text_config
from .encoding import IGNORED, check_ids, cut, encode
from .messages import Row

Data = TypeVar("Data", Dataset, IterableDataset)

logger = logging.get_logger(__name__)

IDS, MASK = datasets.Sequence(datasets.Value("int32")), datasets.Sequence(datasets.Value("int8"))
COLUMNS = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
NOTES = dict.fromkeys(("source", "num_trained", "num_lost"), datasets.Value("int64"))
NOTES |= {"problem": datasets.Value("string")}


def prepare_dataset(
    dataset: Data,
    tokenizer: Tokenizer,
    max_length: int,
    num_proc: int | None = None,
    vocab_size: int | None = None,
    ignore_columns: Collection[str] = (),
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
        ignore_columns: columns that are not read, if it has them, though they hold text or a mask.

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
    plain = plain.remove_columns([name for name in ignore_columns if name in first])
    row = {name: first[name] for name in first if name not in ignore_columns}
    given = {"tokenizer": tokenizer, "max_length": max_length, "vocab_size": vocab_size}
    read = functools.partial(_tokenize, **given)
    strict = functools.partial(read, is_strict=True)
    strict(row, 0)  # fail at once where every row would
    if isinstance(plain, IterableDataset):
        rows = map_rows(plain, strict, COLUMNS)
        return rows.filter(lambda row: any(label != IGNORED for label in row["labels"]))
    rows = map_rows(plain, read, {**COLUMNS, **NOTES}, "Tokenizing", num_proc)
    return _drop_untrained(rows, len(plain), max_length)


def map_rows(
    dataset: Data,
    read: Callable[[Row, int], list[dict[str, Any]]],
    features: Mapping[str, Any],
    desc: str = "",
    num_proc: int | None = None,
) -> Data:
    """Call a function with each row and its number, and collect the rows that it returns.

    Args:
        features: of these; what a row lacks is None.
        desc: of the progress bar; a stream has none.
    """
    known = {"read": read, "names": [*features], "code": code_version()}
    options = {"with_indices": True, "fn_kwargs": known, "remove_columns": columns_of(dataset)}
    if isinstance(dataset, IterableDataset):  # a bad row is raised when it is reached
        return dataset.map(_by_row, batched=True, batch_size=1, **options)
    options |= {"features": datasets.Features(features), "desc": desc, "num_proc": num_proc}
    return dataset.with_format(None).map(_by_row, batched=True, **options)


def columns_of(dataset: Any) -> list[str]:
    """Name the columns of a dataset; a stream may not know its own."""
    return dataset.column_names or list(next(iter(dataset)))


def _by_row(
    batch: dict[str, list], indices: list[int], read: Callable, names: Sequence[str], code: str
) -> dict[str, list]:
    """See `map_rows`; a batch is given by column, and `code` for the cache alone."""
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    found = [one for row, i in zip(rows, indices, strict=True) for one in read(row, i)]
    return {name: [one.get(name) for one in found] for name in names}


@functools.cache
def code_version() -> str:
    """Hash the code that makes rows, and the version of transformers.

    `datasets` knows a function by its name alone, so its cache would outlive an edit.
    """
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(chat.__file__)]
    return digest([*map(file_digest, files), transformers.__version__])


def _tokenize(
    row: Row,
    index: int,
    tokenizer: Tokenizer,
    max_length: int,
    vocab_size: int | None,
    is_strict: bool = False,
) -> list[dict[str, Any]]:
    """Tokenize a row to rows of COLUMNS and NOTES.

    An error is noted in a row of its own, so that all bad rows are counted; `is_strict` raises it.
    """
    problem, whole = "", [{"input_ids": list[int](), "labels": list[int]()}]
    try:
        whole = encode(row, tokenizer, max_length, vocab_size).rows
    except ValueError as error:
        problem = f"Row {index}: {error}"
        if is_strict:
            raise ValueError(problem) from error
    rows = []
    for one in whole:
        part: dict[str, Any] = {**cut(one, max_length), "source": index, "problem": problem}
        part["num_trained"] = sum(label != IGNORED for label in part["labels"])
        part["num_lost"] = len(one["input_ids"]) - len(part["input_ids"])
        rows.append(part)
    return rows


def _drop_untrained(rows: Dataset, num_rows: int, max_length: int) -> Dataset:
    """Drop rows without labels, count them and those that were cut; refuse bad rows.

    Args:
        rows: tokenized, each with the number of its source.
        num_rows: before they were tokenized.
        max_length: that they were cut to.
    """
    notes = rows.select_columns([*NOTES]).to_pandas()
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

    Only a `datasets.Dataset` is read, as Arrow arrays; a stream can be read only once.
    """
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    start = 0
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        extremes = arrow.min_max(arrow.list_flatten(batch["input_ids"])).as_py().values()
        if any(not 0 <= token < vocab_size for token in extremes if token is not None):
            for row, ids in enumerate(batch["input_ids"].to_pylist(), start):
                check_ids(ids, vocab_size, f"Row {row}: ")
        start += len(batch)
