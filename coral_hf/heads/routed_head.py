"""Routed draft head: reads the groups of the LM head in which the router expects the next tokens.

    features ── router ── mass of each group ── routing ── active groups
        └─────────── logits of these groups alone ◀───────────┘
                          └─ softmax over them all × their mass together: confidence

The logits are those of the target's own head, whatever the groups' mass, so tokens are drawn with
the probabilities that verification uses. The router's mass says how much is left unread, and not
which of the tokens that were read is better: their logits do. From CORAL (LM head router).
"""

import torch
from torch import Tensor
from transformers.utils import logging

from ..lm_head import LMHead
from .group_logits import group_logits
from .router import UNUSED, Router, Routing
from .simple import Children, FullHead

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

    def by_node(self) -> "RoutedHead":
        """Return the same head for nodes that are each alone in their level, as in a chain."""
        weight = None if self._weight is self.head.weight else self._weight
        return RoutedHead(self.head, self.router, self.routing.by_node(), weight)

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """Rank the children of features (batch, nodes, hidden); see [`DraftHead`].

        A child's confidence is the router's mass of all that was read × its probability there; it
        is 0 for what fills up the children where fewer tokens were read.
        """
        log_mass = self.router(features)  # (batch, nodes, groups)
        if _is_nan(log_mass):
            return FullHead(self.head).children(features, log_path, top_k)
        active = self._choose(log_mass, log_path)
        log_confidence = self._confidence(self._read(features, active), log_mass, active)
        best, places = log_confidence.topk(min(top_k, log_confidence.shape[-1]))
        slots, offsets = places // self.groups.size, places % self.groups.size
        group = active.expand(-1, features.shape[1], -1).gather(2, slots)
        return Children(self.groups.tokens(group, offsets), best)

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Compute the target's logits in the active groups, (batch, nodes, vocab)."""
        log_mass = self.router(features)
        if _is_nan(log_mass):
            return FullHead(self.head).logits(features, log_path)
        active = self._choose(log_mass, log_path)
        read = self._read(features, active)
        offsets = torch.arange(self.groups.size, device=read.device)
        tokens = self.groups.tokens(active[..., None], offsets).expand_as(read)
        logits = read.new_full((*read.shape[:2], self.groups.vocab_size), float("-inf"))
        # a place without a token stands for some other token, whose logit it must not overwrite
        return logits.scatter_reduce_(2, tokens.flatten(2), read.flatten(2), "amax")

    def _choose(self, log_mass: Tensor, log_path: Tensor) -> Tensor:
        """Choose groups (batch, 1 or nodes, slots), see [`Routing`]; empty groups are left out."""
        return self.routing.choose(log_mass[..., : self.groups.filled], log_path)

    def _read(self, features: Tensor, active: Tensor) -> Tensor:
        """Compute logits of the active groups, (batch, nodes, slots, size), -inf at no token."""
        weight = self._weight
        features = features.to(weight.dtype)
        raw = group_logits(features, weight, active, self.groups.size, self._bias, self._order)
        return self.head.finish(raw)

    @staticmethod
    def _confidence(logits: Tensor, log_mass: Tensor, active: Tensor) -> Tensor:
        """Log of mass × probability among what was read, (batch, nodes, slots × size)."""
        nodes, logits = log_mass.shape[1], logits.flatten(2)
        is_unused = active == UNUSED  # (batch, 1 or nodes, slots)
        groups = active.masked_fill(is_unused, 0).expand(-1, nodes, -1)
        mass = log_mass.gather(2, groups).masked_fill(is_unused, float("-inf")).logsumexp(-1)
        return logits + (mass - logits.logsumexp(-1))[..., None]


def _is_nan(log_mass: Tensor) -> bool:
    """Whether the router's output (batch, nodes, groups) is NaN; read on the CPU, where it is free.

    Elsewhere the router's weights are checked once a call, see `DraftHeads.bind`.
    """
    is_nan = log_mass.device.type == "cpu" and bool(log_mass.isnan().any())
    if is_nan:
        logger.warning_once(
            "The router's output is NaN: the whole LM head is read where that happens. Check the"
            " drafter's weights and the target's features."
        )
    return is_nan
