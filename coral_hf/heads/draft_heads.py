"""Draft heads: full, quantized, frequency and routed, and what every draft head offers.

In: features predicted by the drafter, (batch, nodes, hidden), and the target's LM head. Out:
`Children`, the best next tokens of each node and how confident the drafter is of them, or logits to
draw from. Which head is read changes what is proposed, never what is verified.

Frequency: FR-Spec (Zhao et al. 2025), VocabTrim. Routed, from CORAL (LM head router), reads the
groups of the LM head in which the router expects the next tokens:

    features ── router ── mass of each group ── routing ── active groups
        └─────────── logits of these groups alone ◀───────────┘
                          └─ softmax over them all × their mass together: confidence

Its logits are those of the target's own head, whatever the groups' mass, so tokens are drawn with
the probabilities that verification uses. The router's mass says how much is left unread, and not
which of the tokens that were read is better: their logits do.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..lm_head import LMHead
from .products import QuantizedRows, group_logits, quantized_logits, rank
from .router import UNUSED, Router, Routing


class Children(NamedTuple):
    """The best next tokens of each node of a tree level, best first."""

    tokens: Tensor  # (batch, nodes, top_k)
    log_confidence: Tensor  # (batch, nodes, top_k), at most 0: it ranks nodes and nothing else


class DraftHead(ABC):
    """What the decoding loop asks of a draft head."""

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """Rank the next tokens of each node.

        Args:
            features: (batch, nodes, hidden), predicted by the drafter.
            log_path: (batch, nodes), log-confidence of the path from the root to each node.
            top_k: children of each node; there are fewer where fewer tokens were read.
        """
        logits = self.logits(features, log_path)
        return Children(*rank(logits, min(top_k, logits.shape[-1])))

    @abstractmethod
    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Compute logits to draw from, -inf for the part of the vocabulary that is not read.

        Their softmax, after temperature and processors, is `draft_probs`: the q of verification,
        normalised over the tokens that were read.

        Args:
            features, log_path: as in `children`.

        Returns:
            (batch, nodes, vocab), in fp32.
        """


class FullHead(DraftHead):
    """Reads the target's whole LM head."""

    def __init__(self, head: LMHead):
        self.head = head

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Compute all logits, (batch, nodes, vocab); see [`DraftHead`]."""
        return self.head.logits(features).float()


class QuantizedHead(FullHead):
    """Reads the whole LM head from a copy in eight bits.

    Args:
        rows: the copy, of shape (vocab, hidden).
    """

    def __init__(self, head: LMHead, rows: QuantizedRows):
        super().__init__(head)
        self.rows = rows

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Compute rounded logits, (batch, nodes, vocab); see [`DraftHead`]."""
        logits, bias = quantized_logits(features, self.rows), self.head.bias
        return self.head.finish(logits if bias is None else logits + bias.float())


class OtherVocabulary(DraftHead):
    """Reads an LM head of the drafter's own, which may know more tokens than its target, or fewer.

    Args:
        logits_of: the head, (batch, nodes, hidden) → (batch, nodes, own_vocab).
        num_tokens: of the target.
    """

    def __init__(self, logits_of: Callable[[Tensor], Tensor], num_tokens: int):
        self._logits_of, self._num_tokens = logits_of, num_tokens

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Compute all logits, (batch, nodes, vocab); see [`DraftHead`]."""
        return fit_vocabulary(self._logits_of(features).float(), self._num_tokens)


def fit_vocabulary(logits: Tensor, num_tokens: int) -> Tensor:
    """Logits (*batch, own_vocab) as of a target's tokens: others are cut, new ones are -inf."""
    added = num_tokens - logits.shape[-1]
    return F.pad(logits, (0, added), value=float("-inf")) if added else logits


class FrequencyHead(DraftHead):
    """Reads the LM head's rows of the most frequent tokens.

    Args:
        tokens: their ids, of shape (read,).
        weight: (read, hidden), their rows of the head.
    """

    def __init__(self, head: LMHead, tokens: Tensor, weight: Tensor):
        self.head, self.tokens, self.weight = head, tokens, weight

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """Rank the children of features (batch, nodes, hidden); see [`DraftHead`].

        Confidence is the probability among the tokens that are read.
        """
        places, log_confidence = rank(self._read(features), min(top_k, len(self.tokens)))
        return Children(self.tokens[places], log_confidence)

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Compute the logits of the frequent tokens, (batch, nodes, vocab); see [`DraftHead`]."""
        return spread(self._read(features), self.tokens, self.head.weight.shape[0])

    def _read(self, features: Tensor) -> Tensor:
        """(batch, nodes, hidden) → (batch, nodes, read)"""
        bias = None if self.head.bias is None else self.head.bias[self.tokens]
        raw = F.linear(features.to(self.weight.dtype), self.weight, bias)
        return self.head.finish(raw).float()


def spread(read: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """Logits (*batch, read) of tokens (read,) as of all, (*batch, vocab), -inf for others."""
    logits = read.new_full((*read.shape[:-1], vocab_size), float("-inf"))
    return logits.index_copy(-1, tokens, read)


class RoutedHead(DraftHead):
    """Reads the active groups of the LM head.

    Args:
        weight: (vocab, hidden), the head's rows in the order of the groups; None reads the head's
            own, through the order where there is one.
        vocab_size: tokens of the groups; the head's by default. A head may have more rows since.
    """

    def __init__(
        self,
        head: LMHead,
        router: Router,
        routing: Routing,
        weight: Tensor | None = None,
        vocab_size: int | None = None,
    ):
        self.head, self.router, self.routing = head, router, routing
        size = vocab_size or len(head.weight)
        self.groups = router.groups_of(size)
        self._weight = head.weight[:size] if weight is None else weight
        self._bias, self._order = None if head.bias is None else head.bias[:size], router.order
        if weight is not None and router.order is not None:  # what is read lies in that order
            self._bias, self._order = None if self._bias is None else self._bias[router.order], None

    def by_node(self) -> "RoutedHead":
        """Return the same head for nodes that are each alone in their level, as in a chain."""
        own = copy(self)
        own.routing = self.routing._replace(name="per_node")
        return own

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """Rank the children of features (batch, nodes, hidden); see [`DraftHead`].

        A child's confidence is the router's mass of all that was read × its probability there; it
        is 0 for what fills up the children where fewer tokens were read.
        """
        log_mass, active = self._choose(features, log_path)
        logits = self._read(features, active).flatten(2)  # (batch, nodes, slots * size)
        places, log_probs = rank(logits, min(top_k, logits.shape[-1]))
        slots, offsets = places // self.groups.size, places % self.groups.size
        active = active.expand(-1, features.shape[1], -1)  # (batch, nodes, slots)
        tokens = self.groups.tokens(active.gather(2, slots), offsets)
        is_unused = active == UNUSED
        mass = log_mass.gather(2, active.masked_fill(is_unused, 0))
        mass_read = mass.masked_fill(is_unused, float("-inf")).logsumexp(-1)  # (batch, nodes)
        return Children(tokens, log_probs + mass_read[..., None])

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Compute the target's logits in the active groups, (batch, nodes, vocab)."""
        _, active = self._choose(features, log_path)
        read = self._read(features, active)
        offsets = torch.arange(self.groups.size, device=active.device)
        tokens = self.groups.tokens(active[..., None], offsets).expand_as(read)
        logits = read.new_full((*read.shape[:2], len(self.head.weight)), float("-inf"))
        # a place without a token stands for some other token, whose logit it must not overwrite
        return logits.scatter_reduce_(2, tokens.flatten(2), read.flatten(2), "amax")

    def _choose(self, features: Tensor, log_path: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-mass of groups, (batch, nodes, groups), and those that are read.

        These are (batch, 1 or nodes, slots), see [`Routing`]; groups without tokens are left out.
        """
        log_mass = self.router(features)
        return log_mass, self.routing.choose(log_mass[..., : self.groups.filled], log_path)

    def _read(self, features: Tensor, active: Tensor) -> Tensor:
        """Compute logits of the active groups, (batch, nodes, slots, size), -inf at no token."""
        features, size = features.to(self.head.weight.dtype), self.groups.size
        raw = group_logits(features, self._weight, active, size, self._bias, self._order)
        return self.head.finish(raw)
