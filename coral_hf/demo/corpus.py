"""Training rows and held-out prompts, of the standard library's source or of a dataset.

In: DemoSettings. Out: rows that `CoralTrainer` takes and prompts of the benchmark, the same each
time; no prompt is cut from what is trained on.
"""

import re
import sysconfig
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from ..measure.prompts import Prompt, asked_messages
from ..training.data import load_conversations, to_messages
from . import DemoSettings

# tests repeat themselves, tables of characters are not code, and the rest is not in every Python
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "__pycache__", "__phello__"),
    *("encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"),
}
HELD_OUT = (
    *("csv.py", "fractions.py", "heapq.py", "queue.py"),
    *("shelve.py", "statistics.py", "textwrap.py", "zipfile.py"),
)
PROMPT_CHARACTERS = 300  # about 100 tokens
DRAFTER_BATCH_SIZE = 2  # rows of a step: more steps in the same time


class Corpus(NamedTuple):
    """Python source in a fixed order."""

    documents: list[str]  # one file each, to train on
    passages: list[tuple[str, str]]  # held-out file, function or class: from each file in turn


def read_corpus(num_files: int | None = None, folder: Path | None = None) -> Corpus:
    """Read the standard library.

    Args:
        num_files: files to train on; None for all.
        folder: of the source; the running interpreter's own if None.

    Raises:
        ValueError: for a Python that comes without its source.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.py"))
    names = [name for name in names if not SKIPPED_FOLDERS & set(name.split("/"))]
    # a few modules show off other encodings
    sources = {name: (folder / name).read_text("utf-8", "replace") for name in names}
    held_out = [
        [(Path(name).stem, part) for part in passages(sources.pop(name, ""))] for name in HELD_OUT
    ]
    if not sources:
        raise ValueError(
            f"The standard library in {folder} has {len(sources)} source files to train on; use a"
            " Python that comes with its source, or give `target` and `dataset`."
        )
    in_turn = [passage for turn in zip_longest(*held_out) for passage in turn if passage]
    return Corpus(list(sources.values())[:num_files], in_turn)


def passages(source: str) -> list[str]:
    """Return the top-level functions and classes that are long enough to be cut in two."""
    parts = re.split(r"\n(?=(?:def|class) )", source)
    return [part for part in parts[1:] if len(part) > 2 * PROMPT_CHARACTERS]


def first_lines(text: str) -> str:
    """Return the start of a text, up to the end of a line."""
    start = text[:PROMPT_CHARACTERS]
    return start[: start.rfind("\n") + 1] or start


def pack(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Cut documents, an EOS after each, into rows of `input_ids` (length,); no short last row.

    A row starts with BOS wherever it was cut, as a prompt does.
    """
    bos, eos = (
        [token] if token is not None else []
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [token for document in encoded for token in (*document, *eos)]
    size = length - len(bos)
    starts = range(0, len(ids) - size + 1, size)
    rows = [[*bos, *ids[start : start + size]] for start in starts]  # (rows, length)
    return Dataset.from_dict({"input_ids": rows})


def training_rows(settings: DemoSettings, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return as many rows as the drafter's training can use up, shuffled."""
    if settings.dataset is None:
        rows = pack(read_corpus(settings.num_files).documents, tokenizer, settings.row_length)
    else:
        rows = split_dataset(settings)["train"]
    most = settings.drafter_budget.max_steps * DRAFTER_BATCH_SIZE
    return rows.shuffle(seed=settings.seed).select(range(min(most, len(rows))))


def held_out_prompts(settings: DemoSettings) -> list[Prompt]:
    """Return prompts from text that is in no training row."""
    if settings.dataset is not None:
        rows = split_dataset(settings)["test"]
        return [prompt_of_row(dict(row), str(index)) for index, row in enumerate(rows)]
    chosen = read_corpus().passages[: settings.num_prompts]
    return [
        Prompt("stdlib", f"{name}-{index}", text=first_lines(text))
        for index, (name, text) in enumerate(chosen)
    ]


def split_dataset(settings: DemoSettings) -> DatasetDict:
    """Return a dataset's rows to train on and to hold out."""
    rows = load_conversations(str(settings.dataset))
    return rows.train_test_split(test_size=settings.num_prompts, seed=settings.seed)


def prompt_of_row(row: dict, name: str) -> Prompt:
    """Return a conversation up to its last answered user turn, or the start of a text."""
    if row.get("text") is not None:
        return Prompt("held-out", name, text=first_lines(row["text"]))
    return Prompt("held-out", name, tuple(asked_messages(to_messages(row))))
