"""The drafting side of a call, of drafters that predict hidden states of their target.

f̂ is what the drafter's step returns, which the next step reads in the place of a feature.

    committed tokens     x0       x1       x2       x3
    target features      f0       f1       f2
    begin reads          (x1,f0)  (x2,f1)  (x3,f2)        the last output, f̂3, gives level 1
    a level reads        (node, its parent's f̂)           and gives the next level
"""

from collections.abc import Hashable

from torch import Tensor
from torch.nn import functional as F

from ..decoding.caches.fixed_cache import FixedCache
from ..decoding.caches.ragged_cache import RaggedCache
from ..decoding.caches.shared_keys import attend
from ..decoding.guard import accept_features
from ..target import Target, check_target
from .cached_drafting import CachedDrafting, DrafterMemory
from .model import Drafter

LEAST_WINDOW = 32  # holds the levels of any tree


def _window_of(drafter: Drafter, window: int | None) -> int | None:
    """The window of a call, which asks for one or takes the drafter's own; None: all tokens."""
    window = window or getattr(drafter.generation_config, "draft_window", None)
    if window is not None and window < LEAST_WINDOW:
        raise ValueError(
            f"`draft_window` is {window}; use at least {LEAST_WINDOW} tokens, or None for all."
        )
    return window


class CacheContext:
    """A drafter's own cache as the context of its steps."""

    def __init__(self, cache: RaggedCache):
        self.cache = cache
        # (batch, 1, length, slots + length), added to scores; None: plainly causal
        self.mask: Tensor | None = None

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append to the cache and attend to it: (batch, heads, length, head_dim)."""
        is_prompt = self.mask is None and query.shape[2] > 1
        keys, values = self.cache.update(key, value, layer_idx)
        if self.mask is not None:
            return attend(query, keys, values, self.mask.to(query.dtype))
        return F.scaled_dot_product_attention(
            query, keys, values, is_causal=is_prompt, enable_gqa=True
        )


class FeatureDrafting(CachedDrafting):
    """Drafts for one call of `generate`; a family says what it reads and by which head.

    Args:
        drafter, target, memory: see [`CachedDrafting`].
        draft_head: one of `DRAFT_HEADS`; the drafter's own choice by default.
        draft_window: committed tokens that the drafter attends to, and so keeps; all by default, or
            `draft_window` of its `generation_config`.
    """

    drafter: Drafter

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        memory: DrafterMemory | None = None,
        draft_head: str | None = None,
        draft_window: int | None = None,
    ):
        accept_features(target.model)
        check_target(drafter.config, target.model, takes_other_vocabulary=True)
        windows = [_window_of(drafter, draft_window)] * drafter.config.num_hidden_layers
        super().__init__(drafter, target, windows, memory)
        self._head_name = draft_head or drafter.config.draft_head

    @property
    def kind(self) -> Hashable:
        """See [`FixedDrafting`]."""
        return super().kind, self._head_name

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens (batch, new) as a step reads them: (batch, new, hidden)."""
        return self.target.embed(tokens)

    def extend(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Read the next part of prompts, (batch, length + 1); see [`PartwiseDrafting`]."""
        self._read(tokens[:, 1:], features, positions)  # each feature with the token after it

    def _begin(self, tokens: Tensor, features: Tensor, positions: Tensor, is_new: bool) -> None:
        self.extend(tokens, features, positions)

    def _use(self, cache: RaggedCache | FixedCache) -> None:
        super()._use(cache)
        self._context = CacheContext(cache)

    def _step(
        self, tokens: Tensor, states: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """See [`CachedDrafting`]; `mask` is (batch, new, slots + new), added to scores."""
        self._context.mask = None if mask is None else mask[:, None]
        embeddings = self.embed(tokens).to(self.device)
        return self.drafter(embeddings, states, positions, self._context)
