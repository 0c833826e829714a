"""The LM heads that a drafter can read, but for the routed one: full, frequency, low rank.

In: predicted features and the target's LM head. Out: `Children`, the best next tokens of each row
and how sure the drafter is of them, or logits to draw from. Which head is read changes what is
proposed, never what is verified.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..lm_head import LMHead


class Children(NamedTuple):
    """The best next tokens of each row of a tree level, best first."""

    tokens: Tensor  # (batch, rows, top_k)
    log_confidence: Tensor  # (batch, rows, top_k), at most 0: ranks nodes and nothing else


class DraftHead(Protocol):
    """What the decoding loop asks of a draft head."""

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """Rank the next tokens of each row; fewer than `top_k` where fewer were read.

        Args:
            features: (batch, rows, hidden), predicted by the drafter.
            log_path: (batch, rows), log-confidence of each row's path from the root.
            top_k: children of each row.
        """
        ...

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Logits of what the head reads, to draw from; -inf for the rest of the vocabulary.

        The softmax of them, after temperature and processors, is `draft_probs`: the q of
        verification, normalised over the tokens that were read.

        Args:
            features, log_path: as of `children`.

        Returns:
            (batch, rows, vocab), in fp32.
        """
        ...


class FullHead:
    """Reads the whole LM head of the target."""

    def __init__(self, head: LMHead):
        self.head = head

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """See [`DraftHead`]."""
        return _ranked(self.head.logits(features).float(), top_k)

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """See [`DraftHead`]."""
        return self.head.logits(features).float()


class FrequencyHead:
    """Reads the rows of the tokens that the target writes most (FR-Spec, VocabTrim).

    Args:
        tokens: (read,), their ids.
        weight: (read, hidden), their rows of the head.
    """

    def __init__(self, head: LMHead, tokens: Tensor, weight: Tensor):
        self.head = head
        self.tokens = tokens
        self.weight = weight

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """See [`DraftHead`]; the confidence is the probability among the tokens that are read."""
        index, log_confidence = _ranked(self._read(features), min(top_k, len(self.tokens)))
        return Children(self.tokens[index], log_confidence)

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """See [`DraftHead`]."""
        read = self._read(features)
        whole = read.new_full((*read.shape[:-1], self.head.weight.shape[0]), float("-inf"))
        return whole.index_copy(-1, self.tokens, read)

    def _read(self, features: Tensor) -> Tensor:
        """(batch, rows, hidden) → (batch, rows, read)"""
        return self.head.logits_of(features, self.weight, self.tokens).float()


class LowRank(nn.Module):
    """A feature squeezed through a few channels: up(down(h)) (SlimSpec)."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(..., hidden) → (..., hidden)"""
        return self.up(self.down(features))

    @torch.no_grad()
    def start_from(self, head_weight: Tensor) -> None:
        """The best approximation of a head (vocab, hidden): its first singular directions."""
        gram = sum(rows.float().T @ rows.float() for rows in head_weight.split(8192))
        directions = torch.linalg.eigh(gram).eigenvectors[:, -self.down.out_features :]
        self.up.weight.copy_(directions)
        self.down.weight.copy_(directions.T)


class LowRankHead:
    """Reads all tokens, but few channels of each: W up · (down h), with W up computed once.

    Args:
        weight: (vocab, rank), the head's weight times `up`.
    """

    def __init__(self, head: LMHead, low_rank: LowRank, weight: Tensor):
        self.head = head
        self.low_rank = low_rank
        self.weight = weight

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """See [`DraftHead`]."""
        return _ranked(self.logits(features, log_path), top_k)

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """See [`DraftHead`]."""
        return self.head.logits_of(self.low_rank.down(features), self.weight).float()


def _ranked(logits: Tensor, top_k: int) -> Children:
    """The most probable of (batch, rows, tokens), by their place among them."""
    best, places = logits.topk(top_k, dim=-1)
    return Children(places, best - logits.logsumexp(-1, keepdim=True))
