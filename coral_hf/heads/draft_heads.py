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
        return self.head.logits_from(features, self.weight, self.tokens).float()


def spread(read: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """Logits (*batch, read) of tokens (read,) as of all, (*batch, vocab), -inf for others."""
    logits = read.new_full((*read.shape[:-1], vocab_size), float("-inf"))
    return logits.index_copy(-1, tokens, read)


class RoutedHead(DraftHead):
    """Reads the active groups of the LM head.

    Args:
        weight: (vocab, hidden), the head's rows in the order of the groups, as they are or
            quantized; None reads the head's own, through the order where there is one.
        vocab_size: tokens of the groups; the head's by default. A head that has more rows since
            reads these alone; of one that has fewer, `weight` has zeros for those that are gone.
    """

    def __init__(
        self,
        head: LMHead,
        router: Router,
        routing: Routing,
        weight: Tensor | QuantizedRows | None = None,
        vocab_size: int | None = None,
    ):
        self.head, self.router, self.routing = head, router, routing
        self.num_rows = num_rows = head.weight.shape[0]
        vocab_size = vocab_size or num_rows
        self.groups = router.groups_of(vocab_size)
        self._own_weight = weight
        self._weight = head.weight[:vocab_size] if weight is None else weight
        self._order = self.groups.order if weight is None else None
        self._bias, self._is_gone = head.bias, None
        if vocab_size > num_rows:  # what the target has lost is never drafted
            bias = head.weight.new_zeros(num_rows) if self._bias is None else self._bias
            self._bias = F.pad(bias, (0, vocab_size - num_rows), value=float("-inf"))
            self._is_gone = self.groups.mass(self._bias.isfinite().float()) == 0  # (groups,)
        elif self._bias is not None:
            self._bias = self._bias[:vocab_size]
        if self._bias is not None and weight is not None and self.groups.order is not None:
            self._bias = self._bias[self.groups.order]

    def by_node(self) -> "RoutedHead":
        """Return the same head for nodes that are each alone in their level, as in a chain."""
        routing, size = self.routing.by_node(), self.groups.vocab_size
        return RoutedHead(self.head, self.router, routing, self._own_weight, size)

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
        tokens = self._tokens(active.gather(2, slots), offsets)
        is_unused = active == UNUSED
        mass = log_mass.gather(2, active.masked_fill(is_unused, 0))
        mass_read = mass.masked_fill(is_unused, float("-inf")).logsumexp(-1)  # (batch, nodes)
        return Children(tokens, log_probs + mass_read[..., None])

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Compute the target's logits in the active groups, (batch, nodes, vocab)."""
        _, active = self._choose(features, log_path)
        read = self._read(features, active)
        offsets = torch.arange(self.groups.size, device=active.device)
        tokens = self._tokens(active[..., None], offsets).expand_as(read)
        logits = read.new_full((*read.shape[:2], self.num_rows), float("-inf"))
        # a place without a token stands for some other token, whose logit it must not overwrite
        return logits.scatter_reduce_(2, tokens.flatten(2), read.flatten(2), "amax")

    def _choose(self, features: Tensor, log_path: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-mass of groups, (batch, nodes, groups), and those that are read.

        These are (batch, 1 or nodes, slots), see [`Routing`]; groups without tokens are left out.
        """
        log_mass = self.router(features)
        if self._is_gone is not None:
            log_mass = log_mass.masked_fill(self._is_gone, float("-inf")).log_softmax(-1)
        return log_mass, self.routing.choose(log_mass[..., : self.groups.filled], log_path)

    def _tokens(self, group: Tensor, offset: Tensor) -> Tensor:
        """Return the tokens at offsets in groups, of their common shape; any where none is."""
        return self.groups.tokens(group, offset).clamp(max=self.num_rows - 1)

    def _read(self, features: Tensor, active: Tensor) -> Tensor:
        """Compute logits of the active groups, (batch, nodes, slots, size), -inf at no token."""
        features, size = features.to(self.head.weight.dtype), self.groups.size
        raw = group_logits(features, self._weight, active, size, self._bias, self._order)
        return self.head.finish(raw)
