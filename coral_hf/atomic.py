"""Files and folders that are whole or absent, and the one lock: used by everything that writes.

In: what to write, and where. Out: a file or folder that holds the old content or all of the new
one, whatever happens: a kill, a full disk, a second process.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from transformers.utils import logging

logger = logging.get_logger(__name__)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in one move: it holds the old or the new text, never a part.

    Raises:
        OSError: naming the file, of which nothing new is left, such as when the disk is full.
    """
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write an object as JSON in one move; see [`write_text`]."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to be written, which takes its place when the `with` block ends well.

    Raises:
        OSError: naming `path`, of which nothing new is left.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}-{uuid4().hex[:8]}")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path, last: str | None = None) -> Iterator[Path]:
    """A folder beside `path` to be filled, which takes its place when the `with` block ends well.

    Args:
        path: a folder that is absent, or whose content is replaced.
        last: a file that is moved last where `path` exists, since without it the folder counts as
            incomplete.
    """
    path = Path(path).resolve()
    aside = path.with_name(f".{path.name}-{uuid4().hex[:8]}")
    aside.mkdir(parents=True)
    try:
        yield aside
        if not path.exists():
            aside.rename(path)
            return
        # files, since the folder may be the user's current one, or a mounted disk
        replaced = aside.with_name(f"{aside.name}-replaced")
        replaced.mkdir()
        _move_files(path, replaced, last)
        _move_files(aside, path, last)
        shutil.rmtree(replaced)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move_files(source: Path, to: Path, last: str | None) -> None:
    for path in sorted(source.iterdir(), key=lambda path: (path.name == last, path.name)):
        shutil.move(path, to / path.name)


class SoleWriter:
    """The system's lock on a file or folder, which vanishes with its process however that ends.

    Args:
        path: what is written; its lock lies beside a file, and within a folder.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        # uploads to the Hub leave out what begins with an underscore
        folder = self._path if self._path.is_dir() else self._path.parent
        name = "" if self._path.is_dir() else f".{self._path.name}"
        self._holder = folder / f"_writer{name}.json"
        self._lock = FileLock(folder / f"_writer{name}.lock", timeout=0)

    def refusal(self) -> str | None:
        """Take the lock and return None, or say who holds it."""
        self._holder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            return (
                f"{self._path} is in use: {self._who()}. Wait for it, stop it, or choose another"
                " output."
            )
        since = datetime.now().isoformat(" ", "seconds")
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        with suppress(OSError):  # on a full disk the lock alone has to do
            self._holder.write_text(json.dumps(holder))
        return None

    def release(self) -> None:
        """Give the lock back."""
        self._holder.unlink(missing_ok=True)
        self._lock.release()

    def _who(self) -> str:
        try:
            found = json.loads(self._holder.read_text())
        except (OSError, ValueError):  # it has just begun or ended, or could not write
            return "another run writes to it"
        return f"process {found['process']} on {found['host']} writes to it since {found['since']}"


@contextmanager
def sole_writer(path: str | Path) -> Iterator[None]:
    """Keep every other process away from an output while the `with` block runs.

    Raises:
        ValueError: if another process writes to it, naming that process.
    """
    writer = SoleWriter(path)
    refusal = writer.refusal()
    if refusal is not None:
        raise ValueError(refusal)
    try:
        yield
    finally:
        writer.release()


class JsonLines:
    """A file of objects, one a line, that is appended to."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def mend(self) -> None:
        """Drop a last line that has no end: a kill or a full disk cut it off."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            kept = sum(len(line) for line in file if line.endswith(b"\n"))
            lost = file.tell() - kept
            file.truncate(kept)
        if lost:
            logger.warning(f"{self.path} ended within a line; its last {lost} bytes are dropped.")

    def read(self) -> Iterator[dict[str, Any]]:
        """The objects of the file."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{self.path}, line {number} is no JSON: {error}. Mend or delete the line;"
                        " what it held is made again."
                    ) from error

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows to the disk; what was there stays as it was if that fails."""
        if not rows:
            return
        before = self.path.stat().st_size if self.path.exists() else 0
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            with self.path.open("ab") as file:
                # a lone surrogate has no UTF-8
                file.write(lines.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self.path, before)
            raise
