"""EAGLE-3's side of a call: it fuses hidden states of the target, and has a head of its own."""

from torch import Tensor

from ...heads.draft_heads import Children
from ...heads.ranking import rank
from ...heads.settings import UNTRAINED_HEADS
from ...lm_head import LMHead
from ...target import Target, text_config
from ..feature_drafting import DrafterMemory, FeatureDrafting
from .modeling import Eagle3Drafter


class OwnHead:
    """A draft head on a drafter's own LM head, whose rows stand for its draft vocabulary.

    Args:
        num_tokens: of the target, which may have lost some since the drafter was made.
        name: one of `DRAFT_HEADS`; the drafter's own choice by default.
    """

    def __init__(self, drafter: Eagle3Drafter, num_tokens: int, name: str | None = None):
        if (name or drafter.config.draft_head) not in UNTRAINED_HEADS:
            drafter.check_whole()
        self._head = drafter.heads.bind(LMHead(drafter.lm_head), name)
        self._drafter, self._num_tokens = drafter, num_tokens
        tokens = drafter.draft_tokens
        self._gone = tokens >= num_tokens if bool((tokens >= num_tokens).any()) else None
        self._tokens = tokens.clamp(max=num_tokens - 1)

    def children(self, features: Tensor, log_path: Tensor, top_k: int) -> Children:
        """Rank the children of features (batch, nodes, hidden); see [`DraftHead`]."""
        if self._gone is not None:
            return Children(*rank(self.logits(features, log_path), min(top_k, self._num_tokens)))
        normed, top_k = self._drafter.normed(features), min(top_k, len(self._tokens))
        places, log_confidence = self._head.children(normed, log_path, top_k)
        return Children(self._tokens[places], log_confidence)

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        """Spread logits over the target's vocabulary, (batch, nodes, vocab); see [`DraftHead`]."""
        read = self._head.logits(self._drafter.normed(features), log_path)
        if self._gone is not None:
            read = read.masked_fill(self._gone, float("-inf"))
        logits = read.new_full((*read.shape[:-1], self._num_tokens), float("-inf"))
        # a draft id without a token stands for the last one, whose logit it must not overwrite
        return logits.scatter_reduce(-1, self._tokens.expand_as(read), read, "amax")


class Eagle3Drafting(FeatureDrafting):
    """Drafts for one call of `generate` with an [`Eagle3Drafter`]; see [`FeatureDrafting`]."""

    drafter: Eagle3Drafter

    def __init__(
        self,
        drafter: Eagle3Drafter,
        target: Target,
        memory: DrafterMemory | None = None,
        draft_head: str | None = None,
        draft_window: int | None = None,
    ):
        super().__init__(drafter, target, memory, draft_head, draft_window)
        text, config = text_config(target.model), drafter.config
        config.check_depth(text.num_hidden_layers)
        self.layers = tuple(config.target_layers)
        self.head = OwnHead(drafter, text.vocab_size, draft_head)

    def read(self, features: Tensor) -> Tensor:
        """Fuse features, (batch, new, layers · hidden) → (batch, new, hidden)."""
        return self.drafter.fuse(features)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens (batch, new) by the drafter's own table, or by the target's."""
        has_own = self.drafter.config.has_embeddings
        return self.drafter.embed(tokens) if has_own else self.target.embed(tokens)
