"""Conversations and plain text, read from files, folders or the hub.

In: a path or a hub id. Out: a `datasets.Dataset` with the columns that were found.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .files import check_json, check_text, read_lines

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENT_CHARACTERS = 2000  # about 500 tokens of English
READERS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    ".txt": "text",
    ".csv": "csv",
    ".parquet": "parquet",
}


def load_conversations(path: str | Path, split: str = "train") -> Dataset:
    """Load conversations or plain text from a file, a folder or the hub.

    Args:
        path: a JSON, JSONL, text, parquet or CSV file, also with `.gz`; a folder of `save_to_disk`,
            or of such files; or what `datasets.load_dataset` takes, such as a hub id. Of a text
            file the documents become `text` rows: where no `<|endoftext|>` separates them,
            paragraphs are joined in order to documents of about 2000 characters.
        split: the split; a file has `train`. Text files and saved folders take no slices of it.

    Raises:
        ValueError: for a file that is empty, cut off, not UTF-8 or not JSON, naming the line, and
            for one of an unknown ending.
    """
    import datasets

    file, name = Path(path), str(path)
    reader = _reader_of(file)
    if reader is None or file.is_dir():
        return _load_folder(name, split)
    files = [Path(found) for found in glob.glob(name)]
    if reader != "text":
        return _load_checked(files, reader, split, data_files=name)
    if split != "train":
        raise ValueError(f"`split` is {split!r}, but a text file has 'train' only; use that.")
    _check_texts(files)
    return datasets.Dataset.from_dict({"text": _documents(file)})


def _reader_of(file: Path) -> str | None:
    """How `datasets` calls what reads a file, None for an unknown ending."""
    return READERS.get(Path(file.name.removesuffix(".gz")).suffix)


def _load_folder(name: str, split: str) -> Dataset:
    """A folder, or a dataset of the Hub."""
    import datasets

    folder = Path(name)
    if folder.is_file():
        raise ValueError(
            f"{folder} has the ending {folder.suffix!r}; expected one of {', '.join(READERS)}, also"
            " with .gz. Convert or rename it."
        )
    if (folder / "dataset_dict.json").is_file():
        return datasets.DatasetDict.load_from_disk(name)[split]
    if (folder / "state.json").is_file():
        return datasets.Dataset.load_from_disk(name)
    return _load_checked(_files_of(folder, split) if folder.is_dir() else [], name, split)


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files of a folder that `datasets` reads for a split, and no others that lie there."""
    import datasets

    found = datasets.load_dataset_builder(str(folder)).config.data_files or {}
    return [Path(file) for file in found.get(split.partition("[")[0], [])]


def _load_checked(files: list[Path], source: str, split: str, **options: str) -> Dataset:
    """What `datasets` makes of some files; what is wrong with one of them by its line."""
    import datasets

    _check_texts(files)
    try:
        return datasets.load_dataset(source, split=split, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        for file in files:
            if _reader_of(file) == "json":
                check_json(file)
        name = options.get("data_files", source)
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error


def _check_texts(files: list[Path]) -> None:
    for file in files:
        if _reader_of(file) != "parquet":
            check_text(file)


def _documents(file: Path) -> list[str]:
    text = b"".join(read_lines(file)).decode("utf-8-sig")
    if "<|endoftext|>" in text:
        return [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    documents = [""]
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if len(documents[-1]) >= DOCUMENT_CHARACTERS:
            documents.append("")
        documents[-1] = f"{documents[-1]}\n\n{paragraph}".strip()
    return documents
