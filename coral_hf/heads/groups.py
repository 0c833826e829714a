"""How the vocabulary is cut into groups: equal slices of an order of its tokens.

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
        """Sum probabilities by group: (..., vocab) → (..., groups)."""
        if self.order is not None:
            probs = probs[..., self.order]
        padded = F.pad(probs, (0, self.size * self.num_groups - self.vocab_size))
        return padded.unflatten(-1, (self.num_groups, self.size)).sum(-1)

    def group_of(self) -> Tensor:
        """(vocab,), the group of each token id."""
        if self.order is None:
            return torch.arange(self.vocab_size) // self.size
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(self.vocab_size, device=self.order.device)
        return places // self.size

    def tokens(self, group: Tensor, offset: Tensor) -> Tensor:
        """The tokens at offsets in groups, both (any); token 0's row for what is no token."""
        places = (group * self.size + offset).clamp(0, self.vocab_size - 1)
        return places if self.order is None else self.order[places]


def check_order(order: Tensor, vocab_size: int) -> None:
    """Refuse an order that does not name each token of the vocabulary once.

    Args:
        order: (vocab,), token ids.
    """
    if order.shape != (vocab_size,) or order.is_floating_point():
        raise ValueError(
            f"`order` has shape {tuple(order.shape)} and dtype {order.dtype}; expected token ids"
            f" of shape ({vocab_size},), one for each token of the vocabulary."
        )
    outside = order[(order < 0) | (order >= vocab_size)]
    if len(outside):
        raise ValueError(
            f"`order` holds {outside[:5].tolist()}; token ids go from 0 to {vocab_size - 1}."
        )
    counts = torch.bincount(order, minlength=vocab_size)
    if not (counts == 1).all():
        missing, twice = ((counts == 0).nonzero()[:5, 0], (counts > 1).nonzero()[:5, 0])
        raise ValueError(
            "`order` does not cover the vocabulary: tokens"
            f" {missing.tolist()} (and maybe others) are in no group, {twice.tolist()} in several."
        )


def order_hash(order: Tensor) -> str:
    """SHA-256 of an order (vocab,): which partition a router was trained for."""
    return hashlib.sha256(order.cpu().to(torch.int64).numpy().tobytes()).hexdigest()
