"""A layer of a target's cache that holds an image, or nothing, and no text.

In: keys and values of an image, once. Out: all of them in every pass, whatever becomes of the text.
"""

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class ImageLayer(DynamicLayer):
    """Keys and values (batch, kv_heads, slots, head_dim) of what is no text.

    It stands among layers of a `RaggedCache` and does nothing of what those do with text.
    """

    window = 0  # no token attends to one before it
    start = 0
    slack = 1
    is_plain = record_past = False

    @property
    def held(self) -> int:
        """Slots of the image."""
        return self.get_seq_length()

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Leave the slots where they are."""

    def cut(self, length: int) -> None:
        """Keep all slots."""

    def release(self, first: int) -> None:
        """Keep all slots."""

    def crop(self, tokens_to_remove: int) -> None:
        """Keep all slots."""

    def holds(self, length: int) -> bool:
        """Whether a text of `length` tokens can continue with what is held."""
        return True
