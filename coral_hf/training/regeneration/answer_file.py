"""The file that answers are appended to, and how a run that was broken off goes on.

    out.jsonl                   a row a line, each with its number in the dataset
    out.jsonl.settings.json     what the answers depend on; another run must have the same
    out.jsonl.left_out.jsonl    rows without an answer, with the reason
    out.jsonl.lock              held by the run that writes

In: a path, settings. Out: which rows are done; rows are appended whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runs.files import JsonLines, keep_settings, sole_writer


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
        sidecar = path.with_name(f"{path.name}.settings.json")
        if path.exists() and not sidecar.exists():
            raise ValueError(
                f"`output` {path} exists and was not written by `regenerate`; choose another."
            )
        keep_settings(sidecar, settings, path)
        for file in (self.answers, self.left_out):
            file.mend()
        self.done = {row["row"] for file in (self.answers, self.left_out) for row in file.read()}

    def append(self, rows: Sequence[dict[str, Any]], left_out: Sequence[dict[str, Any]]) -> None:
        """Write the rows of a batch, and those of it that have no answer."""
        self.answers.append(rows)
        self.left_out.append(left_out)
        self.done |= {row["row"] for row in (*rows, *left_out)}


@contextmanager
def open_answers(path: Path, settings: dict[str, Any]) -> Iterator[AnswerFile]:
    """An [`AnswerFile`] that no other run writes to."""
    with sole_writer(path):
        yield AnswerFile(path, settings)
