"""The router: which groups of the vocabulary are worth reading for a level of the draft tree.

In: the features of a level. Out: the mass of each group, and from it the groups that are read. Rows
of a level may want different groups, and at batch 1 a pass costs what it reads, so there are three
ways to choose (`ROUTINGS`), all of fixed shape, with `UNUSED` where a slot reads nothing: nothing
waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .groups import Groups

UNUSED = -1  # the group of a slot that reads nothing


class Router(nn.Module):
    """Which groups of the vocabulary hold the next token (CORAL, LM head router).

    softmax(W₂(SiLU(W₁h) + h)) of a feature h.

    Args:
        order: (vocab,), the tokens by group, saved with the weights; the order of the token ids by
            default.
    """

    order: Tensor | None

    def __init__(self, hidden_size: int, num_groups: int, order: Tensor | None = None):
        super().__init__()
        self.fc = nn.Linear(hidden_size, hidden_size, bias=False)
        self.groups = nn.Linear(hidden_size, num_groups, bias=False)
        self.register_buffer("order", order)

    def forward(self, features: Tensor) -> Tensor:
        """(..., hidden) → (..., groups), log-probabilities in fp32."""
        hidden = F.silu(self.fc(features)) + features
        return self.groups(hidden).float().log_softmax(-1)

    def groups_of(self, vocab_size: int) -> Groups:
        """The groups that it tells apart."""
        return Groups(vocab_size, self.groups.out_features, self.order)


class Routing(NamedTuple):
    """How the groups of a level follow from what the router says of its rows."""

    name: str  # of `ROUTINGS`
    num_active: int  # groups that a text ("shared") or a row (else) reads
    max_active: int | None = None  # groups that a text reads at most, for "union"
    active_mass: float | None = None  # stop once the groups hold this share of the mass

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Routing":
        """That of a drafter with a router."""
        assert config.num_active_groups is not None, "its config checks this"
        return cls(
            config.routing, config.num_active_groups, config.max_active_groups, config.active_mass
        )

    def choose(self, log_mass: Tensor, log_path: Tensor) -> Tensor:
        """The groups that are read.

        Args:
            log_mass: (texts, rows, groups), log-probabilities of the groups that hold tokens.
            log_path: (texts, rows), log-confidence of each row's path from the root.

        Returns:
            (texts, 1, slots) where all rows of a text read alike, else (texts, rows, slots).
        """
        return ROUTINGS[self.name](self, log_mass, log_path)

    def by_row(self) -> "Routing":
        """The same for rows that are each the only one of their level."""
        most = self.num_active if self.max_active is None else min(self.num_active, self.max_active)
        return Routing("per_row", most, active_mass=self.active_mass)


# each: log_mass (texts, rows, groups), log_path (texts, rows) → (texts, 1 or rows, slots)
def shared(routing: Routing, log_mass: Tensor, log_path: Tensor) -> Tensor:
    """The same groups for all rows of a text, ranked by Σ over rows of path × mass."""
    return _largest(_total(log_mass, log_path), routing.num_active, routing.active_mass)


def union(routing: Routing, log_mass: Tensor, log_path: Tensor) -> Tensor:
    """What any row of a text wants for itself, read for all of its rows, up to `max_active`."""
    wanted = per_row(routing, log_mass, log_path)  # (texts, rows, slots)
    total = _total(log_mass, log_path)
    # (texts, 1, groups + 1), the last for slots that want nothing
    is_wanted = F.pad(torch.zeros_like(total, dtype=torch.bool), (0, 1))
    places = torch.where(wanted == UNUSED, total.shape[-1], wanted).flatten(1)[:, None]
    is_wanted = is_wanted.scatter(2, places, True)[..., :-1]
    slots = min(places.shape[-1], total.shape[-1], routing.max_active or total.shape[-1])
    best, groups = total.masked_fill(~is_wanted, -1.0).topk(slots)
    return groups.masked_fill(best < 0, UNUSED)


def per_row(routing: Routing, log_mass: Tensor, log_path: Tensor) -> Tensor:
    """The best groups of each row for that row alone."""
    return _largest(log_mass.exp(), routing.num_active, routing.active_mass)


ROUTINGS = {"shared": shared, "union": union, "per_row": per_row}


def _total(log_mass: Tensor, log_path: Tensor) -> Tensor:
    """The mass of each group over the rows of a text, up to a factor: (texts, 1, groups)."""
    # the best path counts 1, however unlikely it is
    share = log_path - log_path.amax(1, keepdim=True).clamp(min=torch.finfo(log_path.dtype).min)
    return (log_mass + share[..., None]).exp().sum(1, keepdim=True)


def _largest(mass: Tensor, count: int, share: float | None) -> Tensor:
    """The groups of the largest mass: (..., groups) → (..., slots).

    With `share` as few as hold that share of the whole mass, and `count` at most.
    """
    best, groups = mass.topk(min(count, mass.shape[-1]))
    if share is None:
        return groups
    before = best.cumsum(-1) - best  # what the groups before hold
    is_enough = before >= share * mass.sum(-1, keepdim=True)
    is_enough[..., 0] = False  # one group is always read
    return groups.masked_fill(is_enough, UNUSED)
