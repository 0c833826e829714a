"""Documents of a row, told by the positions of its tokens.

In: positions, (batch, length), that begin at 0 with each document. A jump to another position
begins a branch: another end of the document, which shares the tokens before that position with the
document's first part, its trunk. Out: the parts of a row, and which token sees which.

    tokens      a0  a1  a2  a3  a4  b2  b3  c0  c1
    positions   0   1   2   3   4   2   3   0   1
    documents   a0 a1 a2 a3 a4,   a0 a1 b2 b3,   c0 c1
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Tokens that a branch repeats of its trunk before its first trained one: nothing predicts the first
# two tokens of a part, and each further step of an unroll reads the step before at one token more.
REPEATED = 8


class Part(NamedTuple):
    """Tokens of a row that follow each other in a document."""

    start: int
    stop: int
    trunk: int  # where the document begins
    shared: int  # tokens of the trunk that come before; 0 of a trunk

    def of(self, row: Tensor, dim: int = 0) -> Tensor:
        """Select the whole document from a row, (..., length, ...), the shared tokens first."""
        own = row.narrow(dim, self.start, self.stop - self.start)
        return (
            torch.cat([row.narrow(dim, self.trunk, self.shared), own], dim) if self.shared else own
        )


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
