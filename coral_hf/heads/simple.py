"""Draft heads without a router: full, frequency and low rank; and what every draft head offers.

In: features predicted by the drafter, (batch, nodes, hidden), and the target's LM head. Out:
`Children`, the best next tokens of each node and how confident the drafter is of them, or logits to
draw from. Which head is read changes what is proposed, never what is verified.

Frequency: FR-Spec (Zhao et al. 2025), VocabTrim. Low rank: SlimSpec.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..lm_head import LMHead


class Children(NamedTuple):
    """The best next tokens of each node of a tree level, best first."""

    tokens: Tensor  # (batch, nodes, top_k)
    log_confidence: Tensor  # (batch, nodes, top_k), at most 0: it ranks nodes and nothing else


class DraftHead(Protocol):
    """What the decoding loop asks of a draft head."""

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """Rank the next tokens of each node.

        Args:
            features: (batch, nodes, hidden), predicted by the drafter.
            log_path: (batch, nodes), log-confidence of the path from the root to each node.
            top_k: children of each node; there are fewer where fewer tokens were read.
        """
        ...

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Compute logits to draw from, -inf for the part of the vocabulary that is not read.

        Their softmax, after temperature and processors, is `draft_probs`: the q of verification,
        normalised over the tokens that were read.

        Args:
            features, log_path: as in `children`.

        Returns:
            (batch, nodes, vocab), in fp32.
        """
        ...


class FullHead:
    """Reads the target's whole LM head."""

    def __init__(self, head: LMHead):
        self.head = head

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """Rank the children of features (batch, nodes, hidden); see [`DraftHead`]."""
        return _best(self.logits(features, log_path), top_k)

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Compute all logits, (batch, nodes, vocab); see [`DraftHead`]."""
        return self.head.logits(features).float()


class FrequencyHead:
    """Reads the LM head's rows of the most frequent tokens.

    Args:
        tokens: their ids, of shape (read,).
        weight: (read, hidden), their rows of the head.
    """

    def __init__(self, head: LMHead, tokens: Tensor, weight: Tensor):
        self.head = head
        self.tokens = tokens
        self.weight = weight

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """Rank the children of features (batch, nodes, hidden); see [`DraftHead`].

        Confidence is the probability among the tokens that are read.
        """
        places, log_confidence = _best(self._read(features), min(top_k, len(self.tokens)))
        return Children(self.tokens[places], log_confidence)

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Compute the logits of the frequent tokens, (batch, nodes, vocab); see [`DraftHead`]."""
        read = self._read(features)
        logits = read.new_full((*read.shape[:-1], self.head.weight.shape[0]), float("-inf"))
        return logits.index_copy(-1, self.tokens, read)

    def _read(self, features: Tensor) -> Tensor:
        """(batch, nodes, hidden) → (batch, nodes, read)"""
        return self.head.logits_from(features, self.weight, self.tokens).float()


class LowRank(nn.Module):
    """Projects features to a few channels and back: up(down(h)), (*batch, hidden) both."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)  # (rank, hidden)
        self.up = nn.Linear(rank, hidden_size, bias=False)  # (hidden, rank)

    def forward(self, features: Tensor) -> Tensor:
        """(*batch, hidden) → (*batch, hidden)"""
        return self.up(self.down(features))

    @torch.no_grad()
    def start_from(self, head_weight: Tensor) -> None:
        """Set the channels to the first singular directions of a head (vocab, hidden)."""
        gram = sum(rows.float().T @ rows.float() for rows in head_weight.split(8192))
        directions = torch.linalg.eigh(gram).eigenvectors[:, -self.down.out_features :]
        self.up.weight.copy_(directions)
        self.down.weight.copy_(directions.T)


class LowRankHead(FullHead):
    """Reads a few channels of all tokens: (W up)(down h), with W up computed once.

    Args:
        weight: (vocab, rank), the head's weight times `up`.
    """

    def __init__(self, head: LMHead, low_rank: LowRank, weight: Tensor):
        super().__init__(head)
        self.low_rank = low_rank
        self.weight = weight

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Compute approximate logits, (batch, nodes, vocab); see [`DraftHead`]."""
        return self.head.logits_from(self.low_rank.down(features), self.weight).float()


def _best(logits: Tensor, top_k: int) -> Children:
    """Rank logits (batch, nodes, read); `tokens` are places among what was read."""
    best, places = logits.topk(top_k, dim=-1)
    return Children(places, best - logits.logsumexp(-1, keepdim=True))
