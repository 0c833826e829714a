"""The file that answers are appended to, and how a run that was broken off goes on.

    out.jsonl                   a row a line, each with its number in the dataset
    out.jsonl.settings.json     what the answers depend on; another run must have the same
    out.jsonl.left_out.jsonl    rows without an answer, with the reason
    out.jsonl.lock              held by the run that writes

In: a path, settings. Out: which rows are done; rows are appended whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.utils import logging

from ..data.messages import shown

logger = logging.get_logger(__name__)


class JsonLines:
    """A file of objects, one a line, that survives a kill and a full disk."""

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
                        " a deleted row is answered again."
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


class AnswerFile:
    """Answered rows by their number in the dataset.

    Args:
        path: of the answers.
        settings: what they depend on, compared with those of the file.

    Raises:
        ValueError: for a file that was written with other settings, or by something else.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.answers = JsonLines(path)
        self.left_out = JsonLines(path.with_name(f"{path.name}.left_out.jsonl"))
        self._check(path, path.with_name(f"{path.name}.settings.json"), settings)
        for file in (self.answers, self.left_out):
            file.mend()
        self.done = {row["row"] for file in (self.answers, self.left_out) for row in file.read()}

    @staticmethod
    def _check(path: Path, sidecar: Path, settings: dict[str, Any]) -> None:
        if not sidecar.exists():
            if path.exists():
                raise ValueError(
                    f"`output` {path} exists and was not written by `regenerate`; choose another."
                )
            unfinished = sidecar.with_name(f"{sidecar.name}.new")
            unfinished.write_text(json.dumps(settings, indent=1) + "\n")
            os.replace(unfinished, sidecar)
            return
        found = json.loads(sidecar.read_text())
        for name in sorted({*found, *settings}):
            then, now = found.get(name), settings.get(name)
            if then != now:
                raise ValueError(
                    f"`output` {path} was written with {name} = {shown(then)}, now it is"
                    f" {shown(now)}; go on with the same, or choose another `output`."
                )

    def append(self, rows: Sequence[dict[str, Any]], left_out: Sequence[dict[str, Any]]) -> None:
        """Write the rows of a batch, and those of it that have no answer."""
        self.answers.append(rows)
        self.left_out.append(left_out)
        self.done |= {row["row"] for row in (*rows, *left_out)}


@contextmanager
def open_answers(path: Path, settings: dict[str, Any]) -> Iterator[AnswerFile]:
    """An [`AnswerFile`] that no other run writes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=0):
            yield AnswerFile(path, settings)
    except Timeout as error:
        raise ValueError(
            f"Another run writes to `output` {path}; wait for it, or choose another."
        ) from error
