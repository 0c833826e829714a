"""KV cache whose rows differ in length, and that drops rejected tokens in place.

In: keys and values of a model, and which of them are kept. Out: views of buffers, masks, positions.
Rows of a batch accept different numbers of tokens, so each has its own number of committed slots;
what a row does not use is masked. A tree is written behind the longest row, and a commit moves its
accepted nodes to the end of their row.

    slot       0   1   2   3   4   5  |  6   7   8  (tree)
    row 0      -   0   1   2   3   4  |  root at position 5          - is padding
    row 1      0   1   2   3   .   .  |  root at position 4          . was not accepted

A layer with a sliding window of w holds slots from `start` on: the w - 1 before the shortest row's
end, the slots by which rows differ, and the tree. What it dropped no later query may attend to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from ...target import CONVOLUTION
from ..drafting import host_tensor
from .layers import new_layer

HIDDEN = -1  # the position of a slot that no query attends to


class RaggedCache(Cache):
    """What a model has read, and which slots belong to which row; for targets and drafters alike.

    A pass writes its tokens behind slot `width`; then `append` or `commit` says what they were. All
    counts are known on the host, so no method waits for a device. This is the growing form, whose
    slots are views; one of fixed capacity can have the same methods, with masks over its capacity
    and counts on the device, since callers ask for nothing else.

    Args:
        windows: attention window of each layer, None for full attention.
    """

    positions: Tensor  # (batch, width), `HIDDEN` where no query attends to
    next_positions: Tensor  # (batch,)
    ends: Tensor  # (batch,), committed slots of each row
    lengths: list[int]  # the same on the host

    def __init__(self, windows: Sequence[int | None]):
        super().__init__(layers=[new_layer(window) for window in windows])
        self.begin(0)

    def begin(self, batch: int, device: torch.device | None = None) -> None:
        """Forget which slots, of (batch, width), belong to whom; `append` comes next."""
        self.positions = torch.empty(batch, 0, dtype=torch.long, device=device or "cpu")
        self.ends = self.next_positions = self.positions.new_zeros(batch)
        self.lengths, self._is_padded = [0] * batch, [False] * batch

    def restore(self, positions: Tensor, lengths: Sequence[int]) -> None:
        """Say what layers hold that were filled otherwise.

        Args:
            positions: (batch, width), `HIDDEN` behind a row's end.
            lengths: committed slots of each row.
        """
        self.positions, self.lengths = positions, list(lengths)
        self.ends = host_tensor(lengths).to(positions.device)
        slots = torch.arange(positions.shape[1], device=positions.device)
        is_padding = (positions == HIDDEN) & (slots < self.ends[:, None])
        self._is_padded = is_padding.any(1).tolist()
        self.next_positions = positions.amax(1) + 1

    @property
    def width(self) -> int:
        """Slots of the longest row: where the next pass writes."""
        return self.positions.shape[1]

    @property
    def is_even(self) -> bool:
        """Whether all rows are equally long."""
        return min(self.lengths) == self.width

    @property
    def is_dense(self) -> bool:
        """Whether every row attends to every slot."""
        return self.is_even and not any(self._is_padded)

    def append(self, positions: Tensor) -> None:
        """Commit tokens of causal passes over equally long rows, at (batch, new) positions."""
        self.positions = torch.cat([self.positions, positions], dim=1)
        self._is_padded = (self.positions == HIDDEN).any(1).tolist()
        self.lengths = [length + positions.shape[1] for length in self.lengths]
        self.ends = self.ends + positions.shape[1]
        self.next_positions = torch.maximum(self.next_positions, positions.amax(1) + 1)
        for layer in self.layers:
            if layer.window == CONVOLUTION:
                layer.cut(self.width)  # it has no slots that tell how much is committed

    def commit(self, counts: Sequence[int], nodes: Tensor | None = None) -> None:
        """Keep tokens of the last pass and drop the others.

        Args:
            counts: how many of each row.
            nodes: (batch, longest), which ones, in ascending order and padded with any; None: the
                first ones.
        """
        kept, device = max(counts), self.positions.device
        steps = torch.arange(kept, device=device)
        slots = self.ends[:, None] + steps  # (batch, kept)
        if nodes is None and not self.is_even:
            nodes = steps.expand(len(counts), -1)
        if nodes is not None:
            source = self.width + nodes.to(device)
            # a CPU is free to look whether they lie where they belong
            is_moved = device.type != "cpu" or not source.equal(slots)
            # layers that share another layer's keys stay empty
            for layer in self.layers if is_moved else ():
                if layer.is_initialized:
                    layer.move(source, slots)
        own, new = self.next_positions[:, None] + steps, host_tensor(counts).to(device)
        if self.is_even and min(counts) == kept:
            self.positions = torch.cat([self.positions, own], dim=1)
        else:
            own = own.masked_fill(steps >= new[:, None], HIDDEN)
            self.positions = F.pad(self.positions, (0, kept), value=HIDDEN).scatter(1, slots, own)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.ends, self.next_positions = self.ends + new, self.next_positions + new
        self.truncate(max(self.lengths))
        for layer in self.layers:
            if (layer.window or 0) > 0:  # what has left the windows of all rows
                first = min(self.lengths) - layer.window + 1
                if first - layer.start >= layer.slack:
                    layer.release(first)

    def truncate(self, width: int | None = None) -> None:
        """Keep the first `width` slots; by default those that are committed."""
        width = self.width if width is None else width
        for layer in self.layers:
            layer.cut(width)
        self.positions = self.positions[:, :width]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only some rows of the batch."""
        index = host_tensor(rows)  # of shape (kept,), on the CPU: it indexes tensors of any device
        self.lengths = [self.lengths[row] for row in rows]
        self._is_padded = [self._is_padded[row] for row in rows]
        self.positions, self.next_positions = self.positions[index], self.next_positions[index]
        self.ends = self.ends[index]
        self.batch_select_indices(index)
        self.truncate(max(self.lengths))

    def position_ids(self, depths: Tensor) -> Tensor:
        """Positions of tokens behind the committed ones: (batch or 1, new) → (batch, new)."""
        return self.next_positions.to(depths.device)[:, None] + depths

    def mask(
        self, queries: Tensor, own: Tensor, dtype: torch.dtype, window: int | None = None
    ) -> Tensor:
        """What the tokens of a pass add to the scores of slots: (batch, new, slots held + new).

        Args:
            queries: (batch, new), positions of the tokens.
            own: (batch, new, new), which tokens of the pass attend to which; or (batch, new, more),
                with uncommitted tokens of earlier passes, all of them within the window.
            dtype: of the mask, which is 0 where a token attends and the least number elsewhere.
            window: of the layers that the mask is for. It is counted in slots, as transformers
                does: where a prompt skips positions, they differ.
        """
        start = max((la.start for la in self.layers if la.window == window), default=0)
        device, held, hidden = queries.device, self.width - start, torch.finfo(dtype).min
        added = torch.zeros(*queries.shape, held + own.shape[2], dtype=dtype, device=device)
        committed = added.narrow(2, 0, held)
        if not self.is_dense:
            is_hidden = self.positions[:, start:] == HIDDEN
            committed.masked_fill_(is_hidden.to(device)[:, None], hidden)
        if window is not None:
            slots = torch.arange(start, self.width, device=device)
            # (batch, new), the slots that the tokens would have at the end of their row
            own_slots = queries + (self.ends - self.next_positions).to(device)[:, None]
            committed.masked_fill_(slots <= own_slots[..., None] - window, hidden)
            if own.shape[2] == queries.shape[1]:
                own = own & (queries[..., None] - queries[:, None] < window)
        added.narrow(2, held, own.shape[2]).masked_fill_(~own, hidden)
        return added

    def sees_all(self) -> bool:
        """Whether a lone token behind each row attends to all that is held."""
        sliding = [layer for layer in self.layers if (layer.window or 0) > 0]
        return self.is_dense and all(layer.held < layer.window for layer in sliding)

    def set_recording(self, is_on: bool) -> None:
        """Whether sliding layers keep what a pass pushes out of their window until `commit`."""
        for layer in self.layers:
            layer.record_past = is_on

    def use_plain_append(self) -> None:
        """Append and forget as transformers' own layers do, from now on."""
        for layer in self.layers:
            layer.is_plain, layer.record_past, layer._buffers = True, False, []
            if (layer.window or 0) > 0:
                layer.release(layer.get_seq_length() - layer.window + 1)
