"""Files and folders that are whole or absent, append-only JSON lines, and a lock on an output.

In: what to write, and where. Out: a file that holds its old content or all of the new, whatever
interrupts the writing: a kill, a full disk, a second process.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from reprlib import repr as shortened
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from transformers.utils import logging

logger = logging.get_logger(__name__)

# how the names begin of what is being written, and of locks
PARTIAL, WRITER = ".partial-", "_writer"


def free_bytes(path: str | Path) -> int:
    """Return the bytes that are free where a file or folder is, or will be."""
    existing = next(one for one in Path(path, "x").absolute().parents if one.exists())
    return shutil.disk_usage(existing).free


def shown_bytes(count: float) -> str:
    """Write a number of bytes as GB, or as MB where they are few."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def write_text(path: str | Path, text: str) -> None:
    """Write a file in one move: it holds the old or the new text, never a part.

    Raises:
        OSError: naming `path`, which is as it was, such as when the disk is full.
    """
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write an object as JSON in one move; see [`write_text`]."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of `path` if the `with` block succeeds.

    Its name ends like that of `path`, for writers that choose a format by the suffix.

    Raises:
        OSError: naming `path`, which is as it was.
    """
    path = Path(path)
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise  # the block failed to read something else
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `path` in one move if the `with` block succeeds.

    Into a folder that exists, such as the current directory or one that holds a lock, its files
    are moved one by one.
    """
    path = Path(path).resolve()
    partial = _partial(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            for file in partial.iterdir():
                shutil.move(file, path / file.name)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{uuid4().hex[:8]}-{path.name}")


@contextmanager
def sole_writer(folder: str | Path, file: str = "") -> Iterator[None]:
    """Keep every other process away from an output while the `with` block runs.

    The lock vanishes with its process, however that ends. What an interrupted writer left
    half-written is deleted.

    Args:
        folder: where the output is written; it is created. The lock lies in it, under a name that
            uploads to the Hub leave out.
        file: the name of the output where it is one file, beside which others may be written.

    Raises:
        ValueError: if another process writes to it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{WRITER}{file and '.'}{file}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder / file} is in use: another run writes to it (`fuser {lock.lock_file}` names"
            " its process). Wait for it, stop it, or choose another output."
        ) from None
    try:
        for partial in folder.glob(f"{PARTIAL}*-{escape(file)}*"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        yield
    finally:
        lock.release()


def keep_settings(path: str | Path, settings: Mapping[str, Any], output: str | Path) -> None:
    """Record what an output depends on, or compare it with what was recorded.

    Args:
        path: the JSON file of the record.
        settings: plain values by name.
        output: what depends on them, for the error.

    Raises:
        ValueError: if the output was written with other settings, naming the first.
    """
    now = json.loads(json.dumps(settings))
    if not Path(path).exists():
        return write_json(path, now)
    then = json.loads(Path(path).read_text(encoding="utf-8"))
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            raise ValueError(
                f"`output` {output} was written with {name} = {shortened(then.get(name))}, now it"
                f" is {shortened(now.get(name))}; use the same, or choose another `output`."
            )


class JsonLines:
    """A file of JSON objects, one a line, that is appended to.

    Args:
        path: of the file, which may not exist yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def mend(self) -> JsonLines:
        """Drop a last line that has no end: a kill or a full disk cut it off."""
        if not self.path.exists():
            return self
        with self.path.open("rb+") as file:
            kept = sum(len(line) for line in file if line.endswith(b"\n"))
            lost = file.tell() - kept
            file.truncate(kept)
        if lost:
            logger.warning(f"{self.path} ended within a line; its last {lost} bytes are dropped.")
        return self

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of the file.

        Raises:
            ValueError: for a line that is not JSON, with its number.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    what = f"{self.path}, line {number} is not JSON: {error}"
                    raise ValueError(f"{what}. Repair it, or delete it to redo it.") from error

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows through to the disk; if that fails, what was there stays as it was."""
        if not rows:
            return
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                # a lone surrogate has no UTF-8
                file.write(lines.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            if self.path.exists():
                os.truncate(self.path, before)
            raise
