"""A key-value cache that grows in place and drops rejected rows without being copied.

In: the keys and values that a model computes. Out: views of preallocated buffers. transformers'
dynamic layer copies the whole cache at every call; this one writes each row once, and a round's
commit moves only the accepted rows.

    rows         0 … n-1        n … n+nodes-1
                 committed      nodes of the last tree
    keep(n, [0, 2, 5])          rows n, n+2, n+5 move to n, n+1, n+2; the length becomes n + 3
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

FIRST_CAPACITY = 256


class GrowingLayer(DynamicLayer):
    """One layer's keys and values at the front of a larger buffer.

    Both are (batch, kv_heads, length, head_dim).
    """

    def __init__(self):
        super().__init__()
        self._buffers: list[Tensor] = []  # keys, values: (batch, kv_heads, capacity, head_dim)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim) rows and return all rows so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if not self._has_room(stop):
            self._grow(key_states, value_states, stop)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values

    def keep(self, start: int, rows: Tensor) -> None:
        """Keep rows 0 … start - 1 and start + `rows` (kept,), in this order; drop the others."""
        stop = start + len(rows)
        for states in (self.keys, self.values):
            states[:, :, start:stop] = states[:, :, start + rows.to(states.device)]
        self.keys, self.values = self.keys[:, :, :stop], self.values[:, :, :stop]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last rows; transformers passes their number negated."""
        if self.is_initialized:  # older versions of transformers do not ask
            super().crop(tokens_to_remove)

    def _has_room(self, length: int) -> bool:
        if not self._buffers or length > self._buffers[0].shape[-2]:
            return False
        # inference mode's tensors cannot be written to outside of it
        is_writable = not self._buffers[0].is_inference() or torch.is_inference_mode_enabled()
        # a batch operation of transformers replaces `keys`, which then is no view of the buffer
        return is_writable and self.keys.data_ptr() == self._buffers[0].data_ptr()

    def _grow(self, key_states: Tensor, value_states: Tensor, length: int) -> None:
        """Move the rows to buffers of twice the room."""
        start, capacity = self.get_seq_length(), max(FIRST_CAPACITY, 2 * length)
        buffers = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            buffer = new.new_zeros(*new.shape[:2], capacity, new.shape[-1])
            if start:
                buffer[:, :, :start] = old
            buffers.append(buffer)
        self._buffers = buffers


class GrowingCache(Cache):
    """A cache of `GrowingLayer`s, for targets and drafters alike."""

    def __init__(self, num_layers: int):
        super().__init__(layers=[GrowingLayer() for _ in range(num_layers)])

    def keep(self, start: int, rows: Tensor) -> None:
        """Keep the first `start` rows and the rows start + `rows` (kept,) of every layer."""
        for layer in self.layers:
            if layer.is_initialized:  # layers that share another layer's keys stay empty
                layer.keep(start, rows)

    def truncate(self, length: int) -> None:
        """Keep the first `length` rows."""
        for layer in self.layers:
            layer.crop(min(length - layer.get_seq_length(), 0))


def visible(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive float form of a bool mask (…), True where a query may look.

    Float, not bool: eager attention adds the mask to the scores.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )
