"""Files that survive a kill, a full disk and a second run: the JSON kinds.

In: objects. Out: files that are whole, or as they were.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.utils import logging

from ..data.messages import shown

logger = logging.get_logger(__name__)


def replace_json(path: Path, value: Any) -> None:
    """Write an object into a file in one move: it holds the old or the new one, never a part.

    Raises:
        OSError: naming the file, of which nothing new is left, if the disk is full.
    """
    aside = path.with_name(f"{path.name}.new")
    try:
        aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def keep_settings(sidecar: Path, settings: Mapping[str, Any], output: Path) -> None:
    """Note what an output depends on, or compare it with what was noted.

    Raises:
        ValueError: if the output was written with other settings.
    """
    settings = json.loads(json.dumps(settings))
    if not sidecar.exists():
        replace_json(sidecar, settings)
        return
    found = json.loads(sidecar.read_text(encoding="utf-8"))
    for name in sorted({*found, *settings}):
        then, now = found.get(name), settings.get(name)
        if then != now:
            raise ValueError(
                f"`output` {output} was written with {name} = {shown(then)}, now it is"
                f" {shown(now)}; go on with the same, or choose another `output`."
            )


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Keep a second run away from an output; the lock vanishes with its process.

    Raises:
        ValueError: if another run writes to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"Another run writes to `output` {path}; wait for it, or choose another."
        ) from error


class JsonLines:
    """A file of objects, one a line."""

    def __init__(self, path: Path):
        self.path = path

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


def digest(rows: Any) -> str:
    """SHA-256 of the tokens of a dataset."""
    found = sha256()
    for batch in rows.with_format(None).select_columns("input_ids").iter(batch_size=1000):
        found.update(json.dumps(batch["input_ids"]).encode())
    return found.hexdigest()
