"""What is wrong with a file, by line: bytes that are no text, lines that are no JSON.

In: a text file, perhaps with `.gz`. Out: its lines, or a ValueError naming file, line and byte.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class BadLine(NamedTuple):
    """A line that cannot be read."""

    number: int  # from 1
    byte: int  # of the line, from 1
    problem: str


def read_lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked if its name ends on `.gz`."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is no whole gzip file: {error}. Copy or pack it anew.") from error


def check_text(file: Path) -> None:
    """Raise a ValueError if a file is empty or not UTF-8 throughout."""
    bad, is_empty = [], True
    for number, line in enumerate(read_lines(file), start=1):
        is_empty = is_empty and not line.strip()
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"0x{line[error.start]:02x} is not UTF-8"
            bad.append(BadLine(number, error.start + 1, found))
    if bad:
        raise_bad_line(file, bad, "write the file as UTF-8, or drop them")
    if is_empty:
        raise ValueError(f"{file} is empty; give a file with at least one row.")


def check_json(file: Path) -> None:
    """Raise a ValueError if a file is neither a JSON array nor an object a line."""
    lines = list(read_lines(file))
    start = next((line.strip()[:1] for line in lines if line.strip()), b"")
    if start == b"[":
        bad = _bad_array(b"".join(lines))
    else:
        bad = [
            problem for number, line in enumerate(lines, 1) for problem in _bad_line(line, number)
        ]
    if bad:
        raise_bad_line(file, bad, "mend or drop them")


def _bad_array(data: bytes) -> list[BadLine]:
    try:
        json.loads(data)
    except json.JSONDecodeError as error:
        return [BadLine(error.lineno, error.colno, f"this is no JSON: {error.msg}")]
    return []


def _bad_line(line: bytes, number: int) -> list[BadLine]:
    """The problem of a line that should hold an object; empty lines have none."""
    text = line.decode("utf-8-sig")
    try:
        value = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        byte = len(text[: error.pos].encode()) + 1
        return [BadLine(number, byte, f"this is no JSON: {error.msg}")]
    if not isinstance(value, dict):
        return [BadLine(number, 1, f"a row is an object, not a {type(value).__name__}")]
    return []


def raise_bad_line(file: Path, bad: list[BadLine], remedy: str) -> None:
    """Raise a ValueError of the first bad line, with their number."""
    number, byte, problem = bad[0]
    lines = f"{len(bad)} lines are" if len(bad) > 1 else "1 line is"
    raise ValueError(f"{file}, line {number}, byte {byte}: {problem}. {lines} like this; {remedy}.")
