"""Groups of the vocabulary: equal slices of an order of its tokens.

    vocabulary 10, groups 4           group      0        1        2        3
    order None                        tokens     0 1 2    3 4 5    6 7 8    9
    order [7 2 9 0 1 3 8 4 5 6]       tokens     7 2 9    0 1 3    8 4 5    6

All groups have the same size; the last one that holds tokens may be shorter, and those behind it
are empty and never read.
"""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Groups(NamedTuple):
    """A partition of the vocabulary."""

    vocab_size: int
    num_groups: int
    order: Tensor | None = None  # (vocab,) token ids; None for the order of the ids themselves

    @property
    def size(self) -> int:
        """Tokens of a group."""
        return math.ceil(self.vocab_size / self.num_groups)

    @property
    def filled(self) -> int:
        """Groups that hold a token."""
        return math.ceil(self.vocab_size / self.size)

    def mass(self, probs: Tensor) -> Tensor:
        """Sum probabilities by group: (*batch, vocab) → (*batch, groups)."""
        if self.order is not None:
            probs = probs[..., self.order]
        padded = F.pad(probs, (0, self.size * self.num_groups - self.vocab_size))
        return padded.unflatten(-1, (self.num_groups, self.size)).sum(-1)

    def group_of(self) -> Tensor:
        """Return the group of each token id, of shape (vocab,)."""
        if self.order is None:
            return torch.arange(self.vocab_size) // self.size
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(self.vocab_size, device=self.order.device)
        return places // self.size

    def tokens(self, group: Tensor, offset: Tensor) -> Tensor:
        """Return the tokens at offsets in groups, of their common shape; any where none is."""
        places = (group * self.size + offset).clamp(0, self.vocab_size - 1)
        return places if self.order is None else self.order[places]


def check_token_ids(name: str, ids: Tensor, vocab_size: int, num: int | None = None) -> None:
    """Raise a ValueError unless `ids`, of shape (read,), are different token ids, `num` of them."""
    is_vector = ids.ndim == 1 and len(ids) > 0 and not ids.is_floating_point()
    named = len(ids[(ids >= 0) & (ids < vocab_size)].unique())
    if not is_vector or named < len(ids) or num not in (None, named):
        raise ValueError(
            f"`{name}` has shape {tuple(ids.shape)} and dtype {ids.dtype}, and names {named}"
            f" different tokens; expected {num or 'some'} different ids from 0 to {vocab_size - 1}."
        )


def check_order(order: Tensor, vocab_size: int) -> None:
    """Raise a ValueError unless an order of shape (vocab,) names each token once."""
    check_token_ids("order", order, vocab_size, vocab_size)


def order_hash(order: Tensor) -> str:
    """Compute the SHA-256 of an order of shape (vocab,): the partition a router was trained for."""
    return hashlib.sha256(order.cpu().to(torch.int64).numpy().tobytes()).hexdigest()
