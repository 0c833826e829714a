"""Conversations and plain text, read from files, folders or the Hub.

In: paths or Hub ids. Out: one `datasets.Dataset` with the columns that were found.
"""

import json
import lzma
import math
import random
import re
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import fsspec  # type: ignore[import-untyped]
import pyarrow
from datasets import Dataset

DOCUMENT_CHARACTERS = 2000  # about 500 tokens of English
SCALARS = {"str": "string", "bool": "bool", "int": "int64", "float": "float64"}  # of JSON
SCALARS["float int"] = "float64"
READERS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    ".txt": "text",
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz")
BINARY = ("parquet", "arrow")  # files without lines


def load_conversations(
    path: str | Path, split: str = "train", config: str | None = None, revision: str | None = None
) -> Dataset:
    """Load conversations or plain text from a file, a folder or the Hub.

    Args:
        path: a JSON, JSONL, text, CSV, TSV, parquet or Arrow file, the ones of lines also with
            `.gz`, `.bz2` or `.xz`; a folder of `save_to_disk`, or of such files; or what
            `datasets.load_dataset` takes, such as a Hub id. Of a text file the documents become
            `text` rows: where no `<|endoftext|>` separates them, paragraphs are joined in order to
            documents of about 2000 characters.
        split: the split; a file has `train`. Text files and saved folders take no slices of it.
        config: of a Hub dataset, or a folder with the card of one, that has several.
        revision: of a Hub dataset, its branch, tag or commit.

    Raises:
        ValueError: for a file that is empty, truncated, not UTF-8 or not JSON, naming the line, and
            for an unknown file type.
    """
    file, name = Path(path), str(path)
    if any((file / saved).is_file() for saved in ("dataset_dict.json", "state.json")):
        found = datasets.load_from_disk(name)
        if isinstance(found, dict) and split not in found:
            raise ValueError(f"`split` is {split!r}; give one of the dataset's {[*found]}.")
        return found[split] if isinstance(found, dict) else found
    reader = None if file.is_dir() else _reader_of(file)
    if reader is None and file.is_file():
        raise ValueError(
            f"{file} has the ending {file.suffix!r}; expected one of {', '.join(READERS)}, of"
            f" lines also with {', '.join(COMPRESSED)}. Convert or rename it."
        )
    if reader == "text":
        return datasets.Dataset.from_dict({"text": _documents(file, split)})
    given: dict[str, Any] = {"name": config, "revision": None if file.exists() else revision}
    if reader:
        given = {"data_files": name, **({"delimiter": "\t"} if ".tsv" in file.suffixes else {})}
    builder = datasets.load_dataset_builder(reader or name, **given)
    found = (builder.config.data_files or {}).get(split.partition("[")[0], [])
    files = [Path(local) for local in found if Path(local).is_file()]  # none of a Hub id
    for local in files:  # Arrow takes bytes that are not UTF-8
        if _reader_of(local) not in BINARY:
            deque(_lines(local), maxlen=0)
    try:
        builder.download_and_prepare()
        return builder.as_dataset(split)
    except datasets.exceptions.DatasetGenerationError as error:
        if not files or any(_reader_of(local) != "json" for local in files):
            raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    features = whole_features(files)  # rows have keys that the first ones lack, or are no JSON
    return datasets.load_dataset(reader or name, split=split, features=features, **given)


def _reader_of(file: Path) -> str | None:
    """Name the reader of `datasets` for a file; None for an unknown ending."""
    return READERS.get(Path(file.stem if file.suffix in COMPRESSED else file.name).suffix)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers, decompressed by the ending of its name.

    Raises:
        ValueError: for a file that is empty or truncated, or has a line that is not UTF-8.
    """
    is_empty, number = True, 0
    try:
        with fsspec.open(str(file), compression="infer") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig")
                is_empty = is_empty and not text.strip()
                yield number, text
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}, line {number}: {error}. Repair or drop the line.") from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if file.suffix not in COMPRESSED:
            raise
        raise ValueError(f"{file} is not a whole {file.suffix[1:]} file: {error}.") from error
    if is_empty:
        raise ValueError(f"{file} is empty; give a file with at least one row.")


def _rows(file: Path) -> Iterator[dict]:
    """Yield the rows of a JSON file, of its lines or of its array.

    Raises:
        ValueError: for what is neither, with the line.
    """
    lines = _lines(file)
    for number, text in lines:
        try:
            if text.lstrip().startswith("["):
                yield from json.loads(text + "".join(line for _, line in lines))
            elif text.strip():
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise ValueError(f"a row is an object, not a {type(row).__name__}")
                yield row
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}. Repair or drop it.") from error


def whole_features(files: Sequence[Path]) -> datasets.Features:
    """Read the columns of JSON files over all rows.

    Lists, objects and values of several kinds are kept as JSON, so that they may differ from row to
    row.

    Raises:
        ValueError: for a line that is not JSON.
    """
    kinds: dict[str, set[str]] = {}
    for row in chain.from_iterable(map(_rows, files)):
        for key, value in row.items():
            if value is not None:
                kinds.setdefault(key, set()).add(type(value).__name__)
    names = {key: SCALARS.get(" ".join(sorted(kind))) for key, kind in kinds.items()}
    known = {k: datasets.Value(name) if name else datasets.Json() for k, name in names.items()}
    return datasets.Features(known)


def _documents(file: Path, split: str) -> list[str]:
    """Split a text file into its documents."""
    if split != "train":
        raise ValueError(f"`split` is {split!r}, but a text file has 'train' only; use that.")
    text = "".join(line for _, line in _lines(file))
    if "<|endoftext|>" in text:
        return [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    documents = [""]
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if len(documents[-1]) >= DOCUMENT_CHARACTERS:
            documents.append("")
        documents[-1] = f"{documents[-1]}\n\n{paragraph}".strip()
    return documents


def join_datasets(parts: Sequence[Dataset], names: Sequence[str]) -> Dataset:
    """Concatenate datasets whose rows may have different keys, at any depth.

    A key that a row lacks is null in it, which reading the row leaves out.

    Args:
        names: of their files, for errors.

    Raises:
        ValueError: if they hold different kinds of values under the same key.
    """
    if len(parts) == 1:
        return parts[0]
    schemas = [part.features.arrow_schema.remove_metadata() for part in parts]
    # objects whose keys differ within a file are read as JSON, which holds any objects; text is
    # left alone, since what looks like JSON would come back parsed
    free = {f.name: f for schema in schemas for f in schema if "arrow.json" in str(f.type)}
    freed = [
        pyarrow.schema(f if pyarrow.types.is_string(f.type) else free.get(f.name, f) for f in s)
        for s in schemas
    ]
    try:
        schema = pyarrow.unify_schemas(freed, promote_options="permissive")
    except pyarrow.ArrowTypeError as error:
        raise ValueError(f"{', '.join(names)} hold different kinds of values: {error}.") from error
    merged, aligned = datasets.Features.from_arrow_schema(schema), []
    for part in parts:
        features = datasets.Features({name: merged[name] for name in part.features})
        aligned.append(part if part.features == features else part.cast(features))
    return datasets.concatenate_datasets(aligned)


def with_weight(rows: Dataset, weight: float) -> Dataset:
    """Return the rows of a dataset `weight` times: 2 is each of them twice, 0.5 a half of them.

    The half is drawn with a fixed seed.
    """
    if not weight > 0:
        raise ValueError(f"The weight of a dataset is {weight}; give a number above 0.")
    size = round(math.modf(weight)[0] * len(rows))
    part = sorted(random.Random(0).sample(range(len(rows)), size))
    return rows.select([*range(len(rows))] * int(weight) + part) if weight != 1 else rows
