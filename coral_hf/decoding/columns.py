"""The columns of a cache: which of them hold a row's text, and at which positions.

In: what is read and what is kept. Out: masks and positions. Rows of a batch accept different
numbers of tokens, so each has its own number of committed columns; what a row does not use is
never looked at. A tree is always written behind the longest row.

    column     0   1   2   3   4   5  |  6   7   8  (tree)
    row 0      -   0   1   2   3   4  |  root at position 5          - is padding
    row 1      0   1   2   3   .   .  |  root at position 4          . was not accepted
"""

import torch
from torch import Tensor
from torch.nn import functional as F

HIDDEN = -1  # the position of a column that is not to be looked at


class Columns:
    """Committed columns of a cache, left-aligned in each row."""

    def __init__(self, batch: int, device: torch.device | None = None):
        """Start with no column."""
        self.positions = torch.empty(batch, 0, dtype=torch.long, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # columns of each row
        self.next_positions = torch.zeros_like(self.lengths)
        self.is_even = True  # whether all rows are equally long
        self.is_dense = True  # whether every row may look at every column

    @property
    def width(self) -> int:
        """Columns of the longest row: where the next tree is written."""
        return self.positions.shape[1]

    def append(self, positions: Tensor) -> None:
        """Add a prompt's columns: (batch, new) positions, `HIDDEN` where padded.

        The rows must be equally long, as they are before the first round.
        """
        self.positions = torch.cat([self.positions, positions], dim=1)
        self.lengths = self.lengths + positions.shape[1]
        self.next_positions = torch.maximum(self.next_positions, positions.amax(1) + 1)
        self._look()

    def step(self) -> None:
        """Add one column to every row, where rows are equally long."""
        self.positions = torch.cat([self.positions, self.next_positions[:, None]], dim=1)
        self.lengths = self.lengths + 1
        self.next_positions = self.next_positions + 1

    def _look(self) -> None:
        self.is_dense = bool((self.positions != HIDDEN).all())
        self.is_even = self.is_dense or bool((self.lengths == self.width).all())

    def destinations(self, kept: int) -> Tensor:
        """(batch, kept): the columns behind each row's text."""
        return self.lengths[:, None] + torch.arange(kept, device=self.lengths.device)

    def commit(self, counts: Tensor) -> None:
        """Add (batch,) columns to each row, at the positions that follow."""
        lengths = self.lengths + counts
        width = int(lengths.max())
        positions = F.pad(self.positions, (0, max(width - self.width, 0)), value=HIDDEN)
        behind = torch.arange(positions.shape[1], device=counts.device) - self.lengths[:, None]
        is_new = (behind >= 0) & (behind < counts[:, None])
        positions = torch.where(is_new, self.next_positions[:, None] + behind, positions)
        self.positions, self.lengths = positions[:, :width], lengths
        self.next_positions = self.next_positions + counts
        self._look()

    def truncate(self, width: int) -> None:
        """Keep the first columns of rows that are equally long."""
        self.positions = self.positions[:, :width]
        self.lengths = torch.full_like(self.lengths, width)
        self.next_positions = self.positions.amax(1) + 1
        self._look()

    def select(self, rows: Tensor) -> None:
        """Keep only some rows of the batch, (rows,)."""
        self.lengths, self.next_positions = self.lengths[rows], self.next_positions[rows]
        self.positions = self.positions[rows][:, : int(self.lengths.max())]
        self._look()

    def looks(self, queries: Tensor, window: int | None = None) -> Tensor:
        """Which columns a query may look at: (batch, queries) positions → (batch, queries, width).

        Args:
            queries: positions behind all columns.
            window: how far a query of a sliding layer sees; itself included. It is counted in
                columns, as transformers does: where a prompt skips positions, they differ.
        """
        looks = (self.positions != HIDDEN)[:, None]
        if window is None:
            return looks.expand(-1, queries.shape[1], -1)
        column = torch.arange(self.width, device=queries.device)
        own = queries + (self.lengths - self.next_positions)[:, None]  # (batch, queries) columns
        return looks & (own[..., None] - column < window)


def count_positions(seen: Tensor) -> Tensor:
    """Positions of a padded prompt, (batch, length), `HIDDEN` where it is not `seen`."""
    return (seen.long().cumsum(1) - 1).masked_fill(~seen, HIDDEN)
