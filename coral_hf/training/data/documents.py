"""Documents of a row: told apart by positions, packed into fewer rows, padded to a batch.

Positions, (batch, length), begin at 0 with each document. A jump to another position begins a
branch: another end of the document, which shares the tokens before that position with the
document's first part, its trunk.

    tokens      a0  a1  a2  a3  a4  b2  b3  c0  c1
    positions   0   1   2   3   4   2   3   0   1
    documents   a0 a1 a2 a3 a4,   a0 a1 b2 b3,   c0 c1

In: rows of `prepare_dataset`. Out: fewer rows, of at most `max_length` tokens each, with
`position_ids`, so that no computation goes into padding; batches, and which token sees which.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from .dataset import COLUMNS, IDS, Data, code_version, columns_of
from .encoding import IGNORED
from .messages import Row

# Tokens that a branch repeats of its trunk before its first trained one: nothing predicts the first
# two tokens of a part, and each further step of an unroll reads the step before at one token more.
REPEATED = 8
WINDOW = 1000  # rows that are packed together: the best fits are among a few hundred
PACKED = {**COLUMNS, "position_ids": IDS}


class Part(NamedTuple):
    """Tokens of a row that follow each other in a document."""

    start: int
    stop: int
    trunk: int  # where the document begins
    shared: int  # tokens of the trunk that come before; 0 of a trunk

    def of(self, row: Tensor, dim: int = 0) -> Tensor:
        """Select the whole document from a row, (..., length, ...), the shared tokens first."""
        own = row.narrow(dim, self.start, self.stop - self.start)
        trunk = row.narrow(dim, self.trunk, self.shared)
        return torch.cat([trunk, own], dim) if self.shared else own


def parts_of(positions: Tensor) -> list[list[Part]]:
    """Return the parts of each row of positions, (batch, length); the host reads them."""
    found = []
    for row, begins in zip(positions.tolist(), part_begins(positions).tolist(), strict=True):
        starts, parts, trunk = [i for i, begins in enumerate(begins) if begins], list[Part](), 0
        for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
            trunk = trunk if row[start] else start
            parts.append(Part(start, stop, trunk, row[start]))
        found.append(parts)
    return found


def part_begins(positions: Tensor) -> Tensor:
    """Mark the first token of each part, (batch, length), as the positions."""
    return F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)


def has_branches(positions: Tensor) -> bool:
    """Whether a part of rows, (batch, length), is a branch; the host reads the answer."""
    return bool((part_begins(positions) & (positions > 0)).any())


class Places(NamedTuple):
    """Where each token of some rows stands, (batch, length) each."""

    positions: Tensor
    trunk: Tensor  # index of the first token of its document
    start: Tensor  # and of its part

    @classmethod
    def of(cls, positions: Tensor) -> "Places":
        """Read them from positions, (batch, length)."""
        index = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        firsts = (positions == 0, part_begins(positions))
        return cls(positions, *(index.where(first, 0).cummax(1).values for first in firsts))

    def sees(self, row: Tensor, query: Tensor, key: Tensor, lag: Tensor | int = 0) -> Tensor:
        """Whether a token sees one that is `lag` or more positions before it in its document.

        `row`, `query` and `key` are indices, (...), of rows and tokens; so is the result.
        """
        positions, trunk, start = self
        shared = positions[row, start[row, query]]  # tokens of the trunk before the query's part
        is_own = start[row, query] == start[row, key]
        is_shared = (start[row, key] == trunk[row, query]) & (positions[row, key] < shared)
        return (is_own | is_shared) & (positions[row, key] <= positions[row, query] - lag)

    def mask(self, window: int | None = None) -> Tensor:
        """Mark what each token sees, in a window of positions: (batch, length, length)."""
        batch, length = self.positions.shape
        row, index = (torch.arange(n, device=self.positions.device) for n in (batch, length))
        seen = self.sees(row[:, None, None], index[:, None], index)
        if window is None:
            return seen
        return seen & (self.positions[:, :, None] - self.positions[:, None] < window)


def share_prompts(dataset: Dataset, max_length: int) -> Dataset:
    """Join rows of at most `max_length` tokens where the prompt of one begins a later one.

    So do the answers of a conversation, if each is a row of its own. The last row is the trunk, and
    those before it become its branches, which keep what differs: see above. A dataset
    without such rows stays as it is.
    """
    shared = _map(dataset, _share, max_length)
    return shared if len(shared) < len(dataset) else dataset


def pack_dataset(dataset: Data, max_length: int) -> Data:
    """Pack documents into rows of at most `max_length` tokens, none of them cut.

    Each goes into the fullest row that has room for it, the longest first (best fit decreasing),
    within windows of 1000 rows, so that a stream can be packed too.
    """
    return _map(dataset, _pack, max_length)


def _map(dataset: Data, function: Callable[..., dict[str, list]], max_length: int) -> Data:
    known = {"max_length": max_length, "code": code_version()}
    options = {"remove_columns": columns_of(dataset), "features": datasets.Features(PACKED)}
    return dataset.map(function, batched=True, batch_size=WINDOW, fn_kwargs=known, **options)


def _share(window: dict[str, list], max_length: int, code: str) -> dict[str, list]:
    groups = list[list[dict[str, list[int]]]]()  # the last ones first
    room = 0
    for ids, labels in zip(reversed(window["input_ids"]), reversed(window["labels"]), strict=True):
        start = shared_length(ids, labels, groups[-1][0]["input_ids"]) if groups else 0
        length = len(ids) - start
        if not start or length > room:
            groups.append([])
            start, length, room = 0, len(ids), max_length
        room -= length
        row = {"input_ids": ids[start:], "attention_mask": [1] * length, "labels": labels[start:]}
        groups[-1].append({**row, "position_ids": [*range(start, len(ids))]})
    # a branch that began right after the end of another would look like a part of it
    rows = [
        [trunk, *sorted(branches, key=lambda part: -part["position_ids"][0])]
        for trunk, *branches in reversed(groups)
    ]
    return _joined(rows)


def shared_length(ids: list[int], labels: list[int], trunk: list[int]) -> int:
    """Count the tokens that a row, (length,), can leave out as a branch of a trunk.

    It repeats the last ones that both have. It leaves out none where its prompt, but for the mark
    that it ends with, is not the trunk's beginning.
    """
    prompt = next((i for i, label in enumerate(labels) if label != IGNORED), 0)
    pairs = zip(ids[:prompt], trunk, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(prompt, len(trunk)))
    return max(shared - REPEATED, 0) if shared + REPEATED >= prompt else 0


def _pack(window: dict[str, list], max_length: int, code: str) -> dict[str, list]:
    lengths = [len(ids) for ids in window["input_ids"]]
    window = {"position_ids": [range(length) for length in lengths], **window}
    documents = [{name: window[name][i] for name in PACKED} for i in range(len(lengths))]
    return _joined([[documents[i] for i in row] for row in best_fit(lengths, max_length)])


def _joined(rows: list[list[dict[str, Any]]]) -> dict[str, list]:
    """Return the columns of rows that consist of several parts each."""
    return {
        name: [[*chain.from_iterable(part[name] for part in row)] for row in rows]
        for name in PACKED
    }


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Distribute documents over rows of at most `room` tokens.

    Args:
        lengths: (documents,), tokens of each.
        room: at least the longest.

    Returns:
        The indices of the documents of each row.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (what is left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(spaces, (lengths[index], -1))
        left, row = spaces.pop(place) if place < len(spaces) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(spaces, (left - lengths[index], row))
    return rows


@dataclass
class CoralCollator:
    """Pad rows of [`prepare_dataset`] on the right to three tensors, each (batch, length).

    Packed rows have `position_ids` too, and rows of a feature cache `features` (batch, length,
    hidden).

    >>> batch = CoralCollator()([dataset[0], dataset[1]])
    """

    pad_token_id: int = 0  # any id of the vocabulary: mask and labels hide it

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Pad rows to `input_ids`, `attention_mask`, `labels` and what else they have, by name.

        Returns:
            (batch, length) each, `features` (batch, length, hidden).
        """
        pads = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        if not pads.keys() <= rows[0].keys():
            raise ValueError(f"Rows have {[*rows[0]]}, not {[*pads]}; use `prepare_dataset`.")
        length = max(len(row["input_ids"]) for row in rows)
        fills: dict[str, Sequence[int]] = {name: [pad] * length for name, pad in pads.items()}
        if "position_ids" in rows[0]:
            fills["position_ids"] = range(length)  # padding is a document of its own
        batch = {
            name: torch.tensor([[*row[name], *fill[: length - len(row[name])]] for row in rows])
            for name, fill in fills.items()
        }
        if "features" in rows[0]:
            batch["features"] = torch.stack(
                [F.pad(row["features"], (0, 0, 0, length - len(row["input_ids"]))) for row in rows]
            )
        # nothing predicts the first two tokens of a document
        positions = batch.get("position_ids", torch.arange(length)[None])  # (batch or 1, length)
        batch["labels"].masked_fill_(positions < 2, IGNORED)
        return batch
