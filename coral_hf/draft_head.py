"""The LM heads that a drafter can read: the target's whole head, or groups picked by a router.

In: predicted features and the target's LM head. Out: `Children`, the best next tokens of each row
and how sure the drafter is of them. Which head is read changes what is proposed, never what is
verified. Router: CORAL, "LM head router".
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes; accelerate leaves an offloaded one's weight on no real device."""
    device = module.weight.device
    hook = getattr(module, "_hf_hook", None)
    return torch.device(hook.execution_device) if device.type == "meta" and hook else device


class Children(NamedTuple):
    """The best next tokens of each row of a tree level, best first."""

    tokens: Tensor  # (batch, rows, top_k)
    log_confidence: Tensor  # (batch, rows, top_k), at most 0: ranks nodes and nothing else


class LMHead(NamedTuple):
    """A target's LM head and what the target does to its output."""

    module: nn.Module  # (..., hidden) → (..., vocab)
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:
        """(vocab, hidden)"""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """(vocab,), for the heads that have one."""
        return getattr(self.module, "bias", None)

    @property
    def is_readable(self) -> bool:
        """Whether rows of the weight can be read in place."""
        weight = self.weight
        return isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta

    def logits(self, features: Tensor) -> Tensor:
        """(..., hidden) → (..., vocab): exactly what the target computes of these features."""
        return self.finish(self.module(self._cast(features)))

    def block_logits(self, features: Tensor, start: int, stop: int) -> Tensor:
        """(..., hidden) → (..., stop - start): logits of tokens start … stop - 1, read in place."""
        bias = None if self.bias is None else self.bias[start:stop]
        return self.finish(F.linear(self._cast(features), self.weight[start:stop], bias))

    def _cast(self, features: Tensor) -> Tensor:
        """Features (any) in the dtype that the head computes in; a quantised head takes any."""
        weight = self.weight
        is_float = isinstance(weight, Tensor) and weight.is_floating_point()
        return features.to(weight.dtype) if is_float else features

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap raw logits (..., any) as the target does."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


class DraftHead(Protocol):
    """What the decoding loop asks of a draft head."""

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """Rank the next tokens of each row.

        Args:
            features: (batch, rows, hidden), predicted by the drafter.
            log_path: (batch, rows), log-confidence of each row's path from the root.
            top_k: children of each row.
        """
        ...

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Logits of what the head reads, to draw from; -inf for the rest of the vocabulary.

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
        logits = self.head.logits(features).float()  # (batch, rows, vocab)
        best, tokens = logits.topk(top_k, dim=-1)
        return Children(tokens, best - logits.logsumexp(-1, keepdim=True))

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """See [`DraftHead`]."""
        return self.head.logits(features).float()


class Router(nn.Module):
    """Which groups of the vocabulary hold the next token (CORAL, LM head router).

    softmax(W₂(SiLU(W₁h) + h)) of a feature h.
    """

    def __init__(self, hidden_size: int, num_groups: int):
        super().__init__()
        self.fc = nn.Linear(hidden_size, hidden_size, bias=False)
        self.groups = nn.Linear(hidden_size, num_groups, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(..., hidden) → (..., groups), log-probabilities in fp32."""
        hidden = F.silu(self.fc(features)) + features
        return self.groups(hidden).float().log_softmax(-1)


def group_size(vocab_size: int, num_groups: int) -> int:
    """Tokens of a group: equal slices of the vocabulary; the last may be shorter or empty."""
    return math.ceil(vocab_size / num_groups)


def group_mass(probs: Tensor, num_groups: int) -> Tensor:
    """Sum probabilities by group: (..., vocab) → (..., groups)."""
    size = group_size(probs.shape[-1], num_groups)
    padded = F.pad(probs, (0, size * num_groups - probs.shape[-1]))
    return padded.unflatten(-1, (num_groups, size)).sum(-1)


class RoutedHead:
    """Reads the few groups of the LM head in which the router expects a level's next tokens.

    The groups are shared by the rows of a text's level, ranked by Σ over rows of path probability ×
    router mass: at batch 1 a pass costs what it reads, so reading each row's own groups would cost
    their union. Texts of a batch have groups of their own.
    """

    def __init__(self, head: LMHead, router: Router, num_active_groups: int):
        self.head = head
        self.router = router
        self.num_active_groups = num_active_groups
        self.num_groups = router.groups.out_features

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """See [`DraftHead`].

        A child's confidence is its group's router mass × its probability within the group.
        """
        log_mass = self.router(features)  # (batch, rows, groups)
        texts = zip(features.split(1), log_mass.split(1), strict=True)
        parts = [
            self._best(self._read(*text, groups), top_k)
            for text, groups in zip(texts, self._choose(log_mass, log_path), strict=True)
        ]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """See [`DraftHead`]: the target's logits in the active groups, whatever their mass."""
        logits = features.new_full(
            (*features.shape[:2], self.head.weight.shape[0]), float("-inf"), dtype=torch.float32
        )
        for text, groups in enumerate(self._choose(self.router(features), log_path)):
            for start, stop in map(self._bounds, groups):
                logits[text, :, start:stop] = self.head.block_logits(features[text], start, stop)
        return logits

    def _choose(self, log_mass: Tensor, log_path: Tensor) -> list[list[int]]:
        """The groups that each text's level reads; the one index read of the routed head."""
        mass = (log_mass + log_path[..., None]).exp().sum(1)  # (batch, groups)
        filled = math.ceil(self.head.weight.shape[0] / self._size)
        return mass[:, :filled].topk(min(self.num_active_groups, filled)).indices.tolist()

    @staticmethod
    def _best(blocks: list[Children], top_k: int) -> Children:
        """The best of all tokens that were read."""
        log_confidence = torch.cat([block.log_confidence for block in blocks], dim=-1)
        # (1, rows, active tokens)
        tokens = torch.cat([block.tokens for block in blocks], dim=-1)
        best, index = log_confidence.topk(min(top_k, tokens.shape[-1]), dim=-1)
        return Children(tokens.gather(-1, index), best)

    def _read(self, features: Tensor, log_mass: Tensor, groups: list[int]) -> list[Children]:
        """All tokens of each active group, as unranked `Children` of one text."""
        blocks = []
        for group in groups:
            start, stop = self._bounds(group)
            # (1, rows, group size)
            logits = self.head.block_logits(features, start, stop).float()
            within = logits.log_softmax(-1) + log_mass[..., group, None]
            tokens = torch.arange(start, stop, device=features.device).expand_as(within)
            blocks.append(Children(tokens, within))
        return blocks

    def _bounds(self, group: int) -> tuple[int, int]:
        """First token of a group, and the one after its last."""
        return group * self._size, min((group + 1) * self._size, self.head.weight.shape[0])

    @property
    def _size(self) -> int:
        return group_size(self.head.weight.shape[0], self.num_groups)


def _joined(parts: list[Children]) -> Children:
    """Children of several texts; where one has fewer, tokens of no confidence fill up."""
    width = max(part.tokens.shape[-1] for part in parts)
    tokens = [F.pad(part.tokens, (0, width - part.tokens.shape[-1])) for part in parts]
    confidence = [
        F.pad(part.log_confidence, (0, width - part.tokens.shape[-1]), value=float("-inf"))
        for part in parts
    ]
    return Children(torch.cat(tokens), torch.cat(confidence))
