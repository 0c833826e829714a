"""Real text that every Python has: the source of its standard library.

In: the interpreter that runs. Out: a Corpus, the files to train on and the passages of a few other
files, never trained on, that prompts are cut from. Both are the same every time.
"""

import re
import sysconfig
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

# tests repeat themselves, tables of characters are no text, and the rest is not in every Python
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "__pycache__", "__phello__"),
    *("encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"),
}
HELD_OUT = (
    *("csv.py", "fractions.py", "heapq.py", "queue.py"),
    *("shelve.py", "statistics.py", "textwrap.py", "zipfile.py"),
)
PROMPT_CHARACTERS = 300  # about 100 tokens


class Corpus(NamedTuple):
    """Python source in a fixed order."""

    documents: list[str]  # one file each, to train on
    passages: dict[str, list[str]]  # by held-out file, its functions and classes


def read_corpus(num_files: int | None = None, folder: Path | None = None) -> Corpus:
    """Read the standard library.

    Args:
        num_files: train on so many files only; None for all.
        folder: of the source; the running interpreter's own if None.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    files = source_files(folder)
    held_out = [file for file in files if file.relative_to(folder).as_posix() in HELD_OUT]
    trained = [file for file in files if file not in held_out][:num_files]
    if not trained or not held_out:
        raise ValueError(
            f"The standard library in {folder} has {len(trained)} source files to train on and "
            f"{len(held_out)} to hold out; expected some of both. Use a Python that comes with its "
            "source, or give `target` and `dataset`."
        )
    return Corpus(
        [read_source(file) for file in trained],
        {file.stem: passages(read_source(file)) for file in held_out},
    )


def source_files(folder: Path) -> list[Path]:
    """Every module that is worth reading, sorted by its name in the library."""
    files = (file for file in folder.rglob("*.py"))
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    return [folder / name for name in names if not SKIPPED_FOLDERS & set(name.split("/"))]


def read_source(file: Path) -> str:
    # a few modules show off other encodings
    return file.read_text(encoding="utf-8", errors="replace")


def passages(source: str) -> list[str]:
    """The top-level functions and classes that are long enough to be cut in two."""
    parts = re.split(r"\n(?=(?:def|class) )", source)
    return [part for part in parts[1:] if len(part) > 2 * PROMPT_CHARACTERS]


def prompt_texts(corpus: Corpus, count: int) -> list[tuple[str, str]]:
    """The name of the file and the start of a passage, from each held-out file in turn."""
    turns = zip_longest(*([(name, p) for p in parts] for name, parts in corpus.passages.items()))
    chosen = [item for turn in turns for item in turn if item is not None]
    return [(name, first_lines(passage)) for name, passage in chosen[:count]]


def first_lines(passage: str) -> str:
    """The start of a passage, up to the end of a line."""
    start = passage[:PROMPT_CHARACTERS]
    return start[: start.rfind("\n") + 1] or start
