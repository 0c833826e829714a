"""Conversations and plain text, read from files, folders or the hub.

In: a path or a hub id. Out: a `datasets.Dataset` with the columns that were found.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import TYPE_CHECKING

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
    if reader != "text":
        return datasets.load_dataset(reader, data_files=name, split=split)
    if split != "train":
        raise ValueError(f"`split` is {split!r}, but a text file has 'train' only; use that.")
    return datasets.Dataset.from_dict({"text": _documents(file)})


def _documents(file: Path) -> list[str]:
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    if "<|endoftext|>" in text:
        return [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    documents = [""]
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if len(documents[-1]) >= DOCUMENT_CHARACTERS:
            documents.append("")
        documents[-1] = f"{documents[-1]}\n\n{paragraph}".strip()
    return documents
