"""A key-value cache that grows in place and drops rejected rows without being copied.

In: the keys and values that a model computes. Out: views of preallocated buffers. transformers'
dynamic layer copies the whole cache at every call; this one writes each column once, and a round's
commit moves only the accepted ones.

    columns                       0 … n-1        n … n+nodes-1
                                  committed      nodes of the last tree
    keep([[n, n+2, n+5]],         columns n, n+2, n+5 move to n, n+1, n+2;
         [[n, n+1, n+2]], n+3)    the length becomes n + 3
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput

FIRST_CAPACITY = 256
# the keyword and the output of `generate` and of models: `past_key_values` before transformers 5.24
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
# the attribute of a returned cache that holds what the drafter has read of the same texts
MEMORY = "drafter_memory"


class GrowingLayer(DynamicLayer):
    """One layer's keys and values at the front of a larger buffer.

    Both are (batch, kv_heads, length, head_dim).
    """

    def __init__(self):
        super().__init__()
        self._buffers: list[Tensor] = []  # keys, values: (batch, kv_heads, capacity, head_dim)
        self.is_plain = False  # whether to append as transformers does

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim) rows and return all rows so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.is_plain:
            return super().update(key_states, value_states)
        start = self.get_seq_length()
        new = key_states.shape[-2]
        stop = start + new
        if not self._has_room(stop):
            self._grow(key_states, value_states, stop)
        # every layer of every pass comes here, and `narrow` is cheaper than slices
        keys, values = self._buffers
        keys.narrow(-2, start, new).copy_(key_states)
        values.narrow(-2, start, new).copy_(value_states)
        self.keys, self.values = keys.narrow(-2, 0, stop), values.narrow(-2, 0, stop)
        return self.keys, self.values

    def keep(self, source: Tensor, destination: Tensor, length: int) -> None:
        """Move the columns `source` to `destination`, (batch, kept) each; then keep `length`."""
        for states in (self.keys, self.values):
            # (batch, kv_heads, kept, head_dim); gathered before written: the two overlap
            shape = (*states.shape[:2], -1, states.shape[-1])
            index, target = (
                part.to(states.device)[:, None, :, None].expand(shape)
                for part in (source, destination)
            )
            states.scatter_(2, target, states.gather(2, index))
        self._cut(length)

    def _cut(self, length: int) -> None:
        self.keys = self.keys.narrow(-2, 0, length)
        self.values = self.values.narrow(-2, 0, length)

    @classmethod
    def of(cls, layer: DynamicLayer) -> "GrowingLayer":
        """A layer with another one's columns."""
        growing = cls()
        if layer.is_initialized and layer.keys.numel():
            growing.update(layer.keys, layer.values)
        return growing

    def be_plain(self) -> None:
        """Append as transformers does from now on: a lone column of a short text costs less so."""
        self.is_plain, self._buffers = True, []

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

    @classmethod
    def of(cls, cache: Cache) -> "GrowingCache | None":
        """A cache with another one's columns, or None if that one has dropped some of them."""
        for layer in cache.layers:
            keys = getattr(layer, "keys", None)
            length = 0 if keys is None else keys.shape[-2]
            if layer.is_initialized and length != layer.get_seq_length():
                return None
        growing = cls(0)
        growing.layers = [
            layer
            if isinstance(layer, GrowingLayer) and not layer.is_plain
            else GrowingLayer.of(layer)
            for layer in cache.layers
        ]
        return growing

    def keep(self, source: Tensor, destination: Tensor, length: int) -> None:
        """Move columns, (batch, kept) each, and keep the first `length` ones of every layer."""
        is_in_place = source.equal(destination)
        for layer in self.layers:
            if layer.is_initialized:  # layers that share another layer's keys stay empty
                layer._cut(length) if is_in_place else layer.keep(source, destination, length)

    def be_plain(self) -> None:
        """Append as transformers does, so that a plain pass costs what it costs there."""
        for layer in self.layers:
            layer.be_plain()

    def rows(self, rows: Tensor) -> "GrowingCache":
        """A cache of some rows of the batch, (rows,)."""
        part = GrowingCache(len(self.layers))
        for layer, own in zip(part.layers, self.layers, strict=True):
            if own.is_initialized:
                layer.update(own.keys[rows], own.values[rows])
        return part

    @classmethod
    def join(cls, parts: "list[tuple[list[int], GrowingCache]]") -> "GrowingCache":
        """One cache of several, each of some rows of the batch; shorter ones end in zeros."""
        order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
        width = max(part.get_seq_length() for _, part in parts)
        whole = cls(len(parts[0][1].layers))
        for index, layer in enumerate(whole.layers):
            layers = [part.layers[index] for _, part in parts]
            if layers[0].is_initialized:
                keys = _joined([one.keys for one in layers], width)[order]
                layer.update(keys, _joined([one.values for one in layers], width)[order])
        return whole

    def truncate(self, length: int) -> None:
        """Keep the first `length` rows."""
        for layer in self.layers:
            layer.crop(min(length - layer.get_seq_length(), 0))


def is_users(cache: Cache | None) -> bool:
    """Whether the caller has passed a cache, and so may go on with it after the call."""
    return cache is not None and (
        getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0
    )


def continued_cache(given: Cache | None, input_ids: Tensor, whole: int) -> GrowingCache | None:
    """The columns that a call goes on with, None where it starts afresh.

    Args:
        given: the call's own.
        input_ids: (batch, length), whole texts or only what is new in them.
        whole: tokens of the whole texts.

    Raises:
        ValueError: if the cache has dropped columns and the text does not come whole.
    """
    if given is None or given.get_seq_length() == 0:
        return None
    length = input_ids.shape[1]
    is_whole, cache = length == whole, GrowingCache.of(given)
    if cache is None:
        if is_whole:
            return None  # read again from the start: right, and slower once
        raise ValueError(
            f"`{CACHE}` is a {type(given).__name__} whose layers do not hold every token,"
            " and `input_ids` only what is new; pass the whole text as `input_ids`."
        )
    if is_whole:  # the last token at least is read, for its logits
        cache.truncate(length - 1)
    return cache


def returned_cache(given: Cache | None, cache: GrowingCache) -> Cache:
    """The caller's own cache, filled, where it is one that grows; else ours."""
    if given is None or not all(isinstance(layer, DynamicLayer) for layer in given.layers):
        return cache
    given.layers = cache.layers
    return given


def _joined(parts: list[Tensor], width: int) -> Tensor:
    """Stack (rows, kv_heads, columns, head_dim) of different widths along the batch."""
    return torch.cat([F.pad(part, (0, 0, 0, width - part.shape[2])) for part in parts])


def visible(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive float form of a bool mask (…), True where a query may look.

    Float, not bool: eager attention adds the mask to the scores.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )
