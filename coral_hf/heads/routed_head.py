"""The routed LM head: reads the groups in which the router expects a level's next tokens.

    features ── router ── mass of each group ── routing ── active groups
        └────────────── logits of these alone ◀──────────────────┘
                          └─ softmax over them all × their mass together: confidence

CORAL, LM head router. The logits are of the target's own head, whatever the groups' mass, so that
what is drawn from them has the probabilities that verification is told. The router's mass says how
much is left unread, and not which of the tokens that were read is better: that their logits know.
"""

import torch
from torch import Tensor
from transformers.utils import logging

from ..lm_head import LMHead
from .draft_head import Children, FullHead
from .group_logits import group_logits
from .router import UNUSED, Router, Routing

logger = logging.get_logger(__name__)


class RoutedHead:
    """Reads the active groups of the LM head.

    Args:
        weight: (vocab, hidden), the head's rows in the order of the groups; None reads the head's
            own, through the order where there is one.
    """

    def __init__(
        self, head: LMHead, router: Router, routing: Routing, weight: Tensor | None = None
    ):
        self.head = head
        self.router = router
        self.routing = routing
        self.groups = router.groups_of(head.weight.shape[0])
        self._weight = head.weight if weight is None else weight
        self._order = self.groups.order if weight is None else None
        self._bias = head.bias
        if head.bias is not None and weight is not None and self.groups.order is not None:
            self._bias = head.bias[self.groups.order]

    def by_row(self) -> "RoutedHead":
        """The same head for rows that are each the only one of their level, as in a chain."""
        weight = None if self._weight is self.head.weight else self._weight
        return RoutedHead(self.head, self.router, self.routing.by_row(), weight)

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """See [`DraftHead`].

        A child's confidence is the router mass of all that was read × its probability there. Where
        fewer tokens were read, the rest have no confidence.
        """
        log_mass = self.router(features)  # (batch, rows, groups)
        if _is_broken(log_mass):
            return FullHead(self.head).children(features, log_path, top_k)
        active = self._choose(log_mass, log_path)
        log_confidence = self._confidence(self._read(features, active), log_mass, active)
        best, places = log_confidence.topk(min(top_k, log_confidence.shape[-1]))
        slots, offsets = places // self.groups.size, places % self.groups.size
        group = active.expand(-1, features.shape[1], -1).gather(2, slots)
        return Children(self.groups.tokens(group, offsets), best)

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """See [`DraftHead`]: the target's logits in the active groups, whatever their mass."""
        log_mass = self.router(features)
        if _is_broken(log_mass):
            return FullHead(self.head).logits(features, log_path)
        active = self._choose(log_mass, log_path)
        read = self._read(features, active)  # (batch, rows, slots, size)
        offsets = torch.arange(self.groups.size, device=read.device)
        tokens = self.groups.tokens(active[..., None], offsets).expand_as(read)
        whole = read.new_full((*read.shape[:2], self.groups.vocab_size), float("-inf"))
        # a place that holds no token stands at another's, and must not overwrite it
        return whole.scatter_reduce_(2, tokens.flatten(2), read.flatten(2), "amax")

    def _choose(self, log_mass: Tensor, log_path: Tensor) -> Tensor:
        """(batch, 1 or rows, slots), see [`Routing`]; empty groups have no say."""
        return self.routing.choose(log_mass[..., : self.groups.filled], log_path)

    def _read(self, features: Tensor, active: Tensor) -> Tensor:
        """Logits of the active groups: (batch, rows, slots, size), -inf where there is no token."""
        weight = self._weight
        features = features.to(weight.dtype)
        raw = group_logits(features, weight, active, self.groups.size, self._bias, self._order)
        return self.head.finish(raw)

    @staticmethod
    def _confidence(logits: Tensor, log_mass: Tensor, active: Tensor) -> Tensor:
        """Log of mass × probability among what was read: (batch, rows, slots × size)."""
        rows, logits = log_mass.shape[1], logits.flatten(2)
        is_unused = active == UNUSED  # (batch, 1 or rows, slots)
        groups = active.masked_fill(is_unused, 0).expand(-1, rows, -1)
        mass = log_mass.gather(2, groups).masked_fill(is_unused, float("-inf")).logsumexp(-1)
        return logits + (mass - logits.logsumexp(-1))[..., None]


def _is_broken(log_mass: Tensor) -> bool:
    """Whether the router (batch, rows, groups) says nothing; on the CPU, where looking is free.

    Elsewhere its weights are looked at once a call, see `DraftHeads.draft_head`.
    """
    is_broken = log_mass.device.type == "cpu" and bool(log_mass.isnan().any())
    if is_broken:
        logger.warning_once(
            "The router's output is NaN: the whole LM head is read where that happens. Check the"
            " drafter's weights and the target's features."
        )
    return is_broken
