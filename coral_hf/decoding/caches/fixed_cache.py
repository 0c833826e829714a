"""KV cache of fixed capacity, whose every shape is the same in each round.

In: what a `RaggedCache` has read. Out: buffers with the same methods, in which counts are tensors
on the device: nothing waits for it, and nothing is compiled twice.

    slot      0   1   2   3   …  size-1 | size …  size+room-1
    row 0     committed slots, in order |  tokens of the newest passes, until a commit
    row 1     one after another         |  what a commit does not keep is never read

A pass writes behind the last committed slot there could be, at the same place in all rounds, and a
commit copies what is kept to the end of its row. A layer with a sliding window of w is a ring of
`size` = w + kept slots (or as a full layer, if that is less):

    slot of a row's token n: n mod size        token in slot s: the largest n before the row's end
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from ..drafting import host_tensor
from .layers import RaggedLayer
from .ragged_cache import HIDDEN, RaggedCache


class FixedLayer(CacheLayerMixin):
    """One layer's keys and values, (batch, kv_heads, size + room, head_dim).

    Args:
        window: attention window of the layer, None for full attention.
        size: committed slots.
        room: uncommitted ones.
    """

    is_compileable = True

    def __init__(self, window: int | None, size: int, room: int):
        super().__init__()
        self.window, self.is_sliding = window, window is not None
        self.size, self.room = size, room
        self.pending = 0  # uncommitted slots that are written

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make buffers like some keys and values, (batch, kv_heads, new, head_dim) each."""
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.size + self.room, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def take(self, layer: RaggedLayer, tokens: Tensor | None) -> None:
        """Take over the committed slots of a layer.

        `tokens`: (batch, size), which token of its row each slot holds, negative where none; None:
            of each slot its own.
        """
        self.lazy_initialization(layer.keys, layer.values)
        for own, states in ((self.keys, layer.keys), (self.values, layer.values)):
            if tokens is None:
                own.narrow(2, layer.start, layer.held).copy_(states)
                continue
            places = (tokens - layer.start).clamp(0, layer.held - 1).to(own.device)
            rows, heads = self._axes()
            own.narrow(2, 0, self.size).copy_(states[rows, heads, places[:, None]])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write (batch, kv_heads, new, head_dim) behind what is there, and return all of it."""
        start, new = self.size + self.pending, key_states.shape[-2]
        # a compiler writes these in place, and the whole buffer for a slice or a `scatter_`
        slots = torch.arange(start, start + new, device=self.keys.device)
        self.keys.index_copy_(2, slots, key_states)
        self.values.index_copy_(2, slots, value_states)
        self.pending += new
        return self.keys.narrow(2, 0, start + new), self.values.narrow(2, 0, start + new)

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots `source` to slots `destination`, (batch, kept) each."""
        rows, heads = self._axes()
        for states in (self.keys, self.values):
            states[rows, heads, destination[:, None]] = states[rows, heads, source[:, None]]

    def _axes(self) -> tuple[Tensor, Tensor]:
        """Indices of all rows and heads: (batch, 1, 1) and (1, kv_heads, 1)."""
        sizes = self.keys.shape[:2]
        rows, heads = (torch.arange(size, device=self.keys.device) for size in sizes)
        return rows[:, None, None], heads[None, :, None]

    def get_seq_length(self) -> int:
        """Slots that a pass comes behind, whether or not they hold a token."""
        return self.size + self.pending

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that a pass over `query_length` tokens attends to, and the first of them."""
        return self.size + self.pending + query_length, 0

    def get_max_length(self) -> int:
        """Slots for committed tokens."""
        return self.size


class FixedCache(Cache):
    """What a model has read, in buffers of fixed capacity; see [`RaggedCache`], which it continues.

    Args:
        source: whose slots are taken over; its layers are given up one by one.
        capacity: tokens that a row may have.
        room: tokens of passes between two commits, at most.
        kept: that a commit keeps of a row, at most; all by default.
    """

    lengths: tuple[int, ...] = ()  # no count is known on the host

    def __init__(self, source: RaggedCache, capacity: int, room: int, kept: int | None = None):
        self.capacity, kept = capacity, room if kept is None else kept
        self._first = source.positions, source.ends, source.next_positions  # where it began
        self.ends, self.next_positions = source.ends.clone(), source.next_positions.clone()
        windows = [layer.window for layer in source.layers]
        # of committed slots; a row may be cut by the tokens of a commit when it ends
        self._sizes = {one: min(capacity, (one or capacity) + kept) for one in windows}
        layers = [FixedLayer(window, self._sizes[window], room) for window in windows]
        super().__init__(layers=layers)
        is_seen = source.positions != HIDDEN  # (batch, width)
        # by window: (batch, size + 1), whether a slot may be attended to; the last is for no token
        self._seen = {}
        for window in self._sizes:
            tokens = self._tokens(window)
            seen = is_seen.gather(1, tokens.clamp(0, max(source.width - 1, 0)))
            seen &= (tokens >= 0) & (tokens < self.ends[:, None])
            self._seen[window] = torch.cat([seen, torch.zeros_like(seen[:, :1])], dim=1)
        for index, layer in enumerate(layers):
            if source.layers[index].is_initialized:
                is_plain = layer.size == capacity
                layer.take(source.layers[index], None if is_plain else self._tokens(layer.window))
                source.layers[index].reset()

    def _tokens(self, window: int | None) -> Tensor:
        """Which token of its row each slot holds: (batch, size), negative where none does."""
        slots = torch.arange(self._sizes[window], device=self.ends.device)
        if self._sizes[window] == self.capacity:
            return slots.expand(len(self.ends), -1)
        last = self.ends[:, None] - 1
        return last - (last - slots) % self._sizes[window]

    def commit(self, counts: Tensor, nodes: Tensor | None = None) -> None:
        """Keep tokens of the passes since the last commit, and drop the others.

        Args:
            counts: (batch,), how many of each row.
            nodes: (batch, longest), which ones, padded with any; None: the first ones.
        """
        longest = self.layers[0].pending if nodes is None else nodes.shape[1]
        steps = torch.arange(longest, device=self.ends.device)
        nodes = steps.expand(len(self.ends), -1) if nodes is None else nodes
        is_kept = steps < counts[:, None]  # (batch, longest)
        places = {}
        for window, size in self._sizes.items():
            places[window] = torch.where(is_kept, (self.ends[:, None] + steps) % size, size)
            self._seen[window].scatter_(1, places[window], is_kept)
        for layer in self.layers:
            if layer.is_initialized:  # layers that share another layer's keys stay empty
                layer.move(layer.size + nodes, places[layer.window])
        self.ends.add_(counts)
        self.next_positions.add_(counts)
        self.truncate()

    def truncate(self) -> None:
        """Drop uncommitted tokens."""
        for layer in self.layers:
            layer.pending = 0

    def position_ids(self, depths: Tensor) -> Tensor:
        """Positions of tokens behind the committed ones: (batch or 1, new) → (batch, new)."""
        return self.next_positions[:, None] + depths

    def mask(
        self, queries: Tensor, own: Tensor, dtype: torch.dtype, window: int | None = None
    ) -> Tensor:
        """What the tokens of a pass add to the scores of slots: (batch, new, size + more).

        See [`RaggedCache.mask`]: `queries` are (batch, new), `own` is (batch, new, more).
        """
        committed = self._seen[window][:, None, :-1].expand(-1, queries.shape[1], -1)
        if window is not None:
            # (batch, new), the tokens that they would be at the end of their row
            tokens = queries + (self.ends - self.next_positions)[:, None]
            committed = committed & (tokens[..., None] - self._tokens(window)[:, None] < window)
            if own.shape[2] == queries.shape[1]:
                own = own & (queries[..., None] - queries[:, None] < window)
        seen = torch.cat([committed, own], dim=2)
        added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return added.masked_fill_(~seen, torch.finfo(dtype).min)

    def sees_all(self) -> bool:
        """Whether a lone token behind each row attends to all that is held: there may be more."""
        return False

    def grown(self, lengths: list[int]) -> RaggedCache:
        """What is committed, as a cache that grows: the first tokens of each row, so many."""
        cache = RaggedCache([layer.window for layer in self.layers])
        cache.set_recording(True)
        width, device = max(lengths), self.ends.device
        slots, ends = torch.arange(width, device=device), host_tensor(lengths).to(device)[:, None]
        positions, first, next_positions = self._first
        before = F.pad(positions[:, :width], (0, max(width - positions.shape[1], 0)))
        later = next_positions[:, None] + slots - first[:, None]  # (batch, width)
        positions = torch.where(slots < first[:, None], before, later)
        cache.restore(positions.masked_fill(slots >= ends, HIDDEN), lengths)
        for layer, own in zip(cache.layers, self.layers, strict=True):
            if own.is_initialized and layer.window is None:
                layer.adopt(own.keys, own.values, width)
            elif own.is_initialized:
                layer.start = max(min(lengths) - layer.window + 1, 0)
                places = torch.arange(layer.start, width, device=own.keys.device) % own.size
                layer.update(own.keys[:, :, places], own.values[:, :, places])
        return cache
