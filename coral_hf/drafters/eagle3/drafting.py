"""EAGLE-3's side of a call, and the parallel drafter's: one pass a round, trees over marginals.

EAGLE-3 fuses hidden states of the target, and has a head of its own. Of a parallel drafter

    committed         x3       x4       x5                      x4 and x5 are new in this round
    the pass reads    (x4,g3)  (x5,g4)  (m,h)    (m,h)          at positions 3 … 6
    and gives                  q1       q2       q3             of the next tokens, levels 1, 2, 3

The pass that reads what was accepted reads the masks of the next tree too, behind the last accepted
token of each row; their keys are dropped. A path's confidence is the product of its tokens'
marginals. Each q is known before a token of the tree is, so drawing from it and testing is exact.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...decoding.caches.ragged_cache import RaggedCache
from ...decoding.drafting import Level, TreeShape
from ...heads.draft_heads import Children, DraftHead, fit_vocabulary, spread
from ...heads.settings import UNTRAINED_HEADS
from ...lm_head import LMHead
from ...target import Target, text_config
from ..cached_drafting import FeatureDrafting
from ..tree_drafting import MarginalDrafting, last_kept
from .modeling import Eagle3Drafter, ParallelDrafter

MASKED = -1  # stands for a token that is not known


class OwnHead(DraftHead):
    """A draft head on a drafter's own LM head, whose rows stand for its draft vocabulary.

    Args:
        num_tokens: of the target, which may have lost some since the drafter was made.
        name: one of `DRAFT_HEADS`; the drafter's own choice by default.
    """

    def __init__(self, drafter: Eagle3Drafter, num_tokens: int, name: str | None = None):
        if (name or drafter.config.draft_head) not in UNTRAINED_HEADS:
            drafter.check_whole()
        self._head = drafter.heads.bind(LMHead(drafter.lm_head), name)
        self._drafter, self._tokens, self._num_tokens = drafter, drafter.draft_tokens, num_tokens
        self._has_lost = bool((self._tokens >= num_tokens).any())

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """Rank the children of features (batch, nodes, hidden); see [`DraftHead`]."""
        if self._has_lost:
            return super().children(features, log_path, top_k)
        normed = self._drafter.normed(features)
        places, log_confidence = self._head.children(normed, log_path, top_k)
        return Children(self._tokens[places], log_confidence)

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Spread logits over the target's vocabulary, (batch, nodes, vocab); see [`DraftHead`]."""
        read = self._head.logits(self._drafter.normed(features), log_path)
        logits = spread(read, self._tokens, self._drafter.config.vocab_size)
        return fit_vocabulary(logits, self._num_tokens)


class Eagle3Drafting(FeatureDrafting):
    """Drafts for one call of `generate` with an [`Eagle3Drafter`]; see [`FeatureDrafting`]."""

    drafter: Eagle3Drafter

    def __init__(self, drafter: Eagle3Drafter, target: Target, *args, **options):
        super().__init__(drafter, target, *args, **options)
        self.layers = tuple(drafter.config.target_layers)

    def _bind(self, name: str | None) -> DraftHead:
        return OwnHead(self.drafter, text_config(self.target.model).vocab_size, name)

    def read(self, features: Tensor) -> Tensor:
        """Fuse features, (batch, new, layers · hidden) → (batch, new, hidden)."""
        return self.drafter.fuse(features)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens (batch, new) by the drafter's own table, or by the target's."""
        has_own = self.drafter.config.has_embeddings
        return self.drafter.embed(tokens) if has_own else self.target.embed(tokens)


class ParallelDrafting(MarginalDrafting, Eagle3Drafting):
    """Drafts for one call of `generate` with a [`ParallelDrafter`]; see [`FeatureDrafting`].

    `_output` holds all levels of the next tree, as far as they are known: (batch, levels, hidden).
    """

    drafter: ParallelDrafter
    _ahead = 0  # masks of a pass

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens (batch, new), of which some may be masked: (batch, new, hidden)."""
        known = super().embed(tokens.clamp(min=0)).to(self.device)
        is_masked = (tokens == MASKED).to(self.device)[..., None]
        return torch.where(is_masked, self.drafter.mask_embedding, known)

    def fix(self, capacity: int, shape: TreeShape, is_drawn: bool) -> tuple[Level, ...]:
        """See [`FixedDrafting`]."""
        self._reach(shape.depth)
        self._output = self._output[:, : shape.depth]
        return super().fix(capacity, shape, is_drawn)

    def _room(self, shape: TreeShape) -> int:
        return 2 * shape.depth

    def _reach(self, depth: int) -> None:
        """Know so many levels from now on; the first tree of a call has a pass of its own."""
        self._ahead = depth - 1
        if self._output.shape[1] < depth:
            none = self._output.new_empty(len(self._output), 0, dtype=torch.long)
            features = self.drafter.mask_hidden[:, :0].expand(len(none), -1, -1)
            masked = self._pass(none, features, none.new_zeros(len(none)))
            self._cache.truncate()
            self._output = torch.cat([self._output[:, :1], masked], dim=1)

    def commit(self, tokens: Tensor, features: Tensor, counts: Tensor) -> None:
        """Read tokens (batch, new) and keep the first `counts` of each row; see [`Drafting`]."""
        if self._ahead == 0:
            return super().commit(tokens, features, counts)
        predicted = self._pass(tokens.to(self.device), features, counts.to(self.device))
        masked = predicted[:, tokens.shape[1] :]
        self._keep(torch.cat([last_kept(predicted, counts), masked], dim=1), counts)

    def _pass(self, tokens: Tensor, features: Tensor, counts: Tensor) -> Tensor:
        """One step over new tokens and masks behind the first `counts` of each row.

        Args:
            tokens: (batch, new).
            features: (batch, new, layers · hidden), before each of them.
            counts: (batch,).

        Returns:
            (batch, new + masks, hidden).
        """
        new, shared = tokens.shape[1], self.drafter.mask_hidden.expand(len(tokens), self._ahead, -1)
        index = torch.arange(new + self._ahead, device=self.device)
        is_masked = index >= new
        places = torch.where(is_masked, counts[:, None] + index - new, index)
        positions = self._cache.position_ids(places)  # (batch, new + masks)
        # a mask sees no token that is dropped: (batch, new + masks, new + masks)
        is_seen = (index < counts[:, None])[:, None] | is_masked | ~is_masked[:, None]
        mask = self._mask(positions, is_seen & (index <= index[:, None]))
        features = torch.cat([features.to(self.device, shared.dtype), shared], dim=1)
        tokens = F.pad(tokens, (0, self._ahead), value=MASKED)
        return self._step(tokens, self.read(features), positions, mask)

    def _outputs(self, levels: int) -> Tensor:
        if isinstance(self._cache, RaggedCache):  # rounds of constant shapes reach far enough
            self._reach(levels)
        return self._output[:, :levels].transpose(0, 1)
