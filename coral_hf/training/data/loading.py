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
READERS = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet", ".csv": "csv"}


def load_conversations(path: str | Path, split: str = "train") -> Dataset:
    """Load conversations or plain text from a file, a folder or the hub.

    Args:
        path: a JSON, JSONL, text, parquet or CSV file, also with `.gz`; a folder of `save_to_disk`;
            or what `datasets.load_dataset` takes, such as a hub id. Of a text file the documents
            become `text` rows: where no `<|endoftext|>` separates them, paragraphs are joined in
            order to documents of about 2000 characters.
        split: the split; a file has `train`. Text files and saved folders take no slices of it.

    Raises:
        ValueError: for a file that is empty, cut off, not UTF-8 or not JSON, naming the line.
    """
    import datasets

    file, name = Path(path), str(path)
    reader = READERS.get(Path(name.removesuffix(".gz")).suffix)
    if reader is None and (file / "dataset_dict.json").is_file():
        return datasets.DatasetDict.load_from_disk(name)[split]
    if reader is None and (file / "state.json").is_file():
        return datasets.Dataset.load_from_disk(name)
    if reader is None:
        return datasets.load_dataset(name, split=split)
    if reader != "parquet":
        for found in glob.glob(name):
            check_text(Path(found))
    if reader != "text":
        return _load_table(reader, name, split)
    if split != "train":
        raise ValueError(f"`split` is {split!r}, but a text file has 'train' only; use that.")
    return datasets.Dataset.from_dict({"text": _documents(file)})


def _load_table(reader: str, name: str, split: str) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(reader, data_files=name, split=split)
    except datasets.exceptions.DatasetGenerationError as error:
        for found in glob.glob(name) if reader == "json" else ():
            check_json(Path(found))
        raise ValueError(
            f"{name} cannot be read as {reader}: {error.__cause__ or error}"
        ) from error


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
