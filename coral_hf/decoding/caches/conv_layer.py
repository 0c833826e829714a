"""A layer of a target's cache that holds the states of a convolution, and no keys and values.

In: states of new tokens. Out: those of the last few tokens before them, and theirs. Rows grow
alike, in chains, so that rejected tokens are the last ones of all rows.
"""

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from ...target import CONVOLUTION


class ConvLayer(LinearAttentionLayer):
    """States (batch, channels, tokens) by their index, as many as a convolution looks back.

    It stands among layers of a `RaggedCache`; while it records, it also holds what a commit may
    drop, as transformers' own layer does.
    """

    window = CONVOLUTION
    start = held = 0
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

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Leave the states where they are: rows grow alike, and the first nodes are kept."""

    def release(self, first: int) -> None:
        """Keep what the convolution looks back on."""

    def holds(self, length: int) -> bool:
        """Whether a text can continue with what is held: it is read again from its first token."""
        return False
