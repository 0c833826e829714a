"""Router of the LM head: which groups of the vocabulary to read for a level of the draft tree.

Groups are equal slices of an order of the tokens; the last one that holds tokens may be shorter,
and those behind it are empty and never read.

    vocabulary 10, groups 4           group      0        1        2        3
    order None                        tokens     0 1 2    3 4 5    6 7 8    9
    order [7 2 9 0 1 3 8 4 5 6]       tokens     7 2 9    0 1 3    8 4 5    6

In: features of the nodes of a level, (batch, nodes, hidden). Out: the probability mass of each
group, and from it the groups that are read. Nodes may want different groups, and at batch 1 a pass
costs what it reads, so there are two ways to choose (`ROUTINGS`). Both have a fixed shape, with
`UNUSED` where a slot reads nothing, so nothing waits for the device. From CORAL (LM head router).
"""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

UNUSED = -1  # the group of a slot that reads nothing


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
        padded = F.pad(probs, (0, self.size * self.num_groups - probs.shape[-1]))
        return padded.unflatten(-1, (self.num_groups, self.size)).sum(-1)

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


class Router(nn.Module):
    """Predicts which groups hold the next token: softmax(W₂(SiLU(W₁h) + h)) of a feature h.

    Args:
        order: the tokens by group, of shape (vocab,), saved with the weights; the order of the
            token ids by default.
    """

    order: Tensor | None

    def __init__(self, hidden_size: int, num_groups: int, order: Tensor | None = None):
        super().__init__()
        self.fc = nn.Linear(hidden_size, hidden_size, bias=False)  # (hidden, hidden)
        self.groups = nn.Linear(hidden_size, num_groups, bias=False)  # (groups, hidden)
        self.register_buffer("order", order)

    def forward(self, features: Tensor) -> Tensor:
        """Return log-probabilities in fp32: (*batch, hidden) → (*batch, groups)."""
        hidden = F.silu(self.fc(features)) + features
        return self.groups(hidden).float().log_softmax(-1)

    def groups_of(self, vocab_size: int) -> Groups:
        """Return the groups that the router tells apart."""
        return Groups(vocab_size, self.groups.out_features, self.order)


class Routing(NamedTuple):
    """How the groups of a level follow from the router's output for its nodes."""

    name: str  # one of `ROUTINGS`
    num_active: int  # groups that a sequence ("shared") or a node ("per_node") reads
    active_mass: float | None = None  # stop once the groups hold this share of the mass

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "Routing":
        """Read the routing of a drafter that has a router."""
        return cls(config.routing, config.num_active_groups, config.active_mass)

    def choose(self, log_mass: Tensor, log_path: Tensor) -> Tensor:
        """Choose the groups of the largest mass: each node's own, or Σ over nodes of path × mass.

        Args:
            log_mass: (batch, nodes, groups), log-probabilities of the groups that hold tokens.
            log_path: (batch, nodes), log-confidence of the path from the root to each node.

        Returns:
            (batch, 1, slots) where all nodes of a sequence read alike, else (batch, nodes, slots).
        """
        if self.name == "shared":
            # up to a factor: the best path counts 1, however unlikely it is
            least = torch.finfo(log_path.dtype).min
            share = log_path - log_path.amax(1, keepdim=True).clamp(min=least)
            mass = (log_mass + share[..., None]).exp().sum(1, keepdim=True)  # (batch, 1, groups)
        else:
            mass = log_mass.exp()
        best, groups = mass.topk(min(self.num_active, mass.shape[-1]))
        if self.active_mass is None:
            return groups
        before = best.cumsum(-1)[..., :-1]  # mass of the groups that come first
        is_enough = before >= self.active_mass * mass.sum(-1, keepdim=True)
        return groups.masked_fill(F.pad(is_enough, (1, 0)), UNUSED)  # one group is always read
