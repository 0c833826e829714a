"""Layers of a ragged cache: of text, of images, and of convolutions.

In: keys and values of each pass, and which slots are kept. Out: views of buffers that drop rejected
tokens in place. A layer with a sliding window holds the window, the slots by which rows differ, and
the tree. Images stay whatever becomes of the text; a convolution has states and no slots.
"""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from ...target import CONVOLUTION

# growing and dropping copy: the buffers of a full layer have one slot to spare for so many that
# they hold, and so many at least; those of a sliding layer too, which also holds as many beyond its
# window
SPARE, GROWTH = 64, 16
SLIDING_SPARE, SLACK = 128, 4


class RaggedLayer(DynamicLayer):
    """One layer's keys and values, (batch, kv_heads, slots, head_dim), in a larger buffer.

    Where transformers' layers copy what they hold at every pass, this one writes each slot once.

    Args:
        window: attention window of the layer, None for full attention.
    """

    def __init__(self, window: int | None = None):
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.start = 0  # the first slot that is held
        self.record_past = False  # whether a sliding layer waits for `release`, as a tree needs
        self.is_plain = False  # whether to append as transformers does
        self._buffers: list[Tensor] = []  # keys, values: (batch, kv_heads, capacity, head_dim)

    @property
    def slack(self) -> int:
        """Slots that leave a sliding window before they are dropped."""
        return 1 if self.is_plain else max(SLACK, (self.window or 0) // SLIDING_SPARE)

    @property
    def held(self) -> int:
        """Slots from `start` to the end."""
        return 0 if not self.is_initialized or not self.keys.numel() else self.keys.shape[-2]

    def get_seq_length(self) -> int:
        """Slots so far, those that were dropped included."""
        return self.start + self.held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that a pass over `query_length` tokens attends to, and the first of them."""
        return self.held + query_length, self.start

    def activate_past_recording(self) -> None:
        """Keep all slots from now on, as transformers' assisted decoding asks."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim) and return all that is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        is_forgetting = self.is_sliding and not self.record_past
        if self.is_plain or is_forgetting:
            self._buffers = []
            states = super().update(key_states, value_states)
            if self.window is not None and is_forgetting:
                self.release(self.get_seq_length() - self.window + 1)
            return states
        held, new = self.held, key_states.shape[-2]
        if not self._has_room(held + new):
            self._grow(key_states, value_states, held + new)
        # `narrow` is cheaper than slices
        keys, values = self._buffers
        keys.narrow(-2, held, new).copy_(key_states)
        values.narrow(-2, held, new).copy_(value_states)
        self.keys, self.values = keys.narrow(-2, 0, held + new), values.narrow(-2, 0, held + new)
        return self.keys, self.values

    def adopt(self, keys: Tensor, values: Tensor, held: int) -> None:
        """Take buffers (batch, kv_heads, capacity, head_dim) over, of which `held` slots count."""
        self.lazy_initialization(keys, values)
        self._buffers = [keys, values]
        self.keys, self.values = (states.narrow(-2, 0, held) for states in self._buffers)

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots `source` to slots `destination`, (batch, kept) each."""
        rows = torch.arange(len(source), device=self.keys.device)[:, None]
        source, destination = (part.to(rows.device) - self.start for part in (source, destination))
        for states in (self.keys, self.values):
            # (batch, kept, kv_heads, head_dim), gathered before written: the two overlap
            states[rows, :, destination] = states[rows, :, source]

    def cut(self, length: int) -> None:
        """Keep the first `length` slots."""
        kept = length - self.start
        if kept < self.held:
            self.keys, self.values = self.keys.narrow(-2, 0, kept), self.values.narrow(-2, 0, kept)

    def release(self, first: int) -> None:
        """Drop the slots before `first`."""
        dropped = min(first - self.start, self.held)
        if dropped <= 0:
            return
        kept = self.held - dropped
        parts = [states.narrow(-2, dropped, kept) for states in (self.keys, self.values)]
        # a view of a long prompt would keep all of it in memory
        self.keys, self.values = (part.clone() if dropped > kept else part for part in parts)
        self.start += dropped
        self._buffers = []

    def holds(self, length: int) -> bool:
        """Whether a sequence of `length` slots can continue with what is held."""
        return self.start <= (0 if self.window is None else max(length - self.window + 1, 0))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last slots; transformers passes their number negated."""
        if not self.is_initialized:  # older versions of transformers do not ask
            return
        if self.start and not self.holds(self.get_seq_length() - abs(tokens_to_remove)):
            raise RuntimeError(
                f"`crop` removes {abs(tokens_to_remove)} tokens, but a layer with a window of"
                f" {self.window} has dropped what the text would attend to."
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything, and give its memory back."""
        self.keys = self.values = None
        self.is_initialized: bool = False
        self.start, self._buffers = 0, []

    def _has_room(self, held: int) -> bool:
        if not self._buffers or held > self._buffers[0].shape[-2]:
            return False
        # inference mode's tensors cannot be written to outside of it
        is_writable = not self._buffers[0].is_inference() or torch.is_inference_mode_enabled()
        # a batch operation of transformers replaces `keys`, which then is no view of the buffer
        return is_writable and self.keys.data_ptr() == self._buffers[0].data_ptr()

    def _grow(self, key_states: Tensor, value_states: Tensor, needed: int) -> None:
        """Move what is held to buffers (batch, kv_heads, capacity, head_dim), a little larger."""
        least, share = (SLACK, SLIDING_SPARE) if self.is_sliding else (GROWTH, SPARE)
        capacity = needed + max(least, needed // share)
        held, self._buffers = self.held, []
        for name, new in (("keys", key_states), ("values", value_states)):
            buffer = new.new_empty(*new.shape[:2], capacity, new.shape[-1])
            if held:
                buffer.narrow(-2, 0, held).copy_(getattr(self, name))
            setattr(self, name, buffer.narrow(-2, 0, held))  # the old keys go before values come
            self._buffers.append(buffer)


class ImageLayer(DynamicLayer):
    """Keys and values (batch, kv_heads, slots, head_dim) of an image, or of nothing: no text.

    It stands among layers of a `RaggedCache`, and all of its slots are read in every pass.
    """

    window = 0  # no token attends to one before it
    start = 0
    is_plain = record_past = False

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Leave the slots where they are, whatever (batch, kept) move in the text."""

    def cut(self, length: int) -> None:
        """Keep all slots."""

    def crop(self, tokens_to_remove: int) -> None:
        """Keep all slots."""

    def holds(self, length: int) -> bool:
        """Whether a text of `length` tokens can continue with what is held."""
        return True


class ConvLayer(LinearAttentionLayer):
    """States (batch, channels, tokens) by their index, as many as a convolution looks back.

    It stands among layers of a `RaggedCache`, where rows grow alike, in chains, so that rejected
    tokens are the last ones of all rows. While it records, it also holds what a commit may drop, as
    transformers' own layer does.
    """

    window = CONVOLUTION
    start = 0
    is_plain = is_sliding = False
    is_initialized = False  # it has no slots that could be moved or copied

    def __init__(self, number_of_states: int = 1):
        super().__init__(number_of_states)
        self._committed = self._drafted = 0  # tokens, of the text and of the newest pass

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs) -> Tensor:
        """Read states of new tokens, (batch, channels, new); see transformers' layer."""
        if self.record_past and state_idx == 0:
            self._drafted += conv_states.shape[-1]
        return super().update_conv_state(conv_states, state_idx, **kwargs)

    def get_seq_length(self) -> int:
        """Slots, of which it has none."""
        return 0

    def cut(self, length: int) -> None:
        """Keep a text of `length` tokens: so many of the newest pass as it has grown by."""
        if self._drafted:
            self.crop(length - self._committed - self._drafted)
        self._committed, self._drafted = length, 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, by their index of shape (rows,)."""
        self.reorder_cache(indices)


def new_layer(window: int | None) -> RaggedLayer | ConvLayer | ImageLayer:
    """An empty layer of a window; see [`coral_hf.target.sliding_windows`]."""
    if window == CONVOLUTION:
        return ConvLayer()
    return ImageLayer() if window == 0 else RaggedLayer(window)
