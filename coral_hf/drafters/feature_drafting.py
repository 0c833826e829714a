"""The drafting side of a call, of drafters that predict hidden states: KV cache and trees.

In: committed tokens and the target's features of them. Out: a `DraftTree` a round. The loop
knows a drafter by the protocol `Drafting` and nothing else. f̂ is what the drafter's step returns,
which the next step reads in the place of a feature.

    committed tokens     x0       x1       x2       x3
    target features      f0       f1       f2
    begin reads          (x1,f0)  (x2,f1)  (x3,f2)        the last output, f̂3, gives level 1
    a level reads        (node, its parent's f̂)           and gives the next level
"""

import weakref
from collections.abc import Hashable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..decoding.acceptance_rules import Uniforms
from ..decoding.caches.fixed_cache import FixedCache
from ..decoding.caches.ragged_cache import HIDDEN, RaggedCache
from ..decoding.caches.shared_keys import attend
from ..decoding.drafting import DraftTree, Level, TreeShape, Warp
from ..decoding.guard import accept_features
from ..heads.draft_heads import DraftHead
from ..target import Target, check_target, text_config
from .model import Drafter
from .tree_builders import Beam, SampledTreeBuilder, TreeBuilder, plan_levels

# tokens of a prompt that are read at once, so that masks and activations do not grow with it
LEAST_PIECE, LARGEST_PIECE = 128, 256
MASK_SIZE = 2**20  # of a piece's mask, one row's
LEAST_WINDOW = 32  # holds the levels of any tree
LEVELS = 64  # nodes of a default tree's levels, all of them


class DrafterMemory(NamedTuple):
    """What a drafter has read of sequences that may continue; it travels with their cache."""

    drafter: weakref.ref
    cache: RaggedCache

    def __reduce__(self) -> tuple:
        """A cache is saved without it: where it is loaded, the drafter is another object."""
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> "DrafterMemory":
        return DrafterMemory(self.drafter, deepcopy(self.cache, memo))

    def fits(self, drafter: Drafter, positions: Tensor, window: int | None = None) -> bool:
        """Whether sequences at (batch, length) `positions` continue where these end."""
        ends = self.cache.next_positions
        return (
            self.drafter() is drafter
            and self.cache.layers[0].window == window
            and len(ends) == len(positions)
            and bool((ends.to(positions.device) == positions[:, 0]).all())
        )


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


class FeatureDrafting:
    """Drafts for one call of `generate`; a family says what it reads and by which head.

    Args:
        drafter: shared by calls; all state of this call is here.
        target: what the drafter reads of its target.
        memory: of an earlier call; ignored where the sequences do not continue it.
        draft_window: committed tokens that the drafter attends to, and so keeps; all by default, or
            `draft_window` of its `generation_config`.
    """

    layers: tuple[int, ...]
    head: DraftHead
    _feature: Tensor  # (batch, 1, hidden), predicted for the root's position

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        memory: DrafterMemory | None = None,
        draft_window: int | None = None,
    ):
        accept_features(target.model)
        check_target(drafter.config, target.model, takes_other_vocabulary=True)
        self.drafter, self._dtype, self.target = drafter, drafter.dtype, target
        self._memory, self._window = memory, _window_of(drafter, draft_window)

    def read(self, features: Tensor) -> Tensor:
        """What a step reads of features (batch, new, width): (batch, new, hidden)."""
        return features

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens (batch, new) as a step reads them: (batch, new, hidden)."""
        return self.target.embed(tokens)

    def memory(self) -> DrafterMemory:
        """Return what was read so far, for a call that continues the same sequences."""
        return DrafterMemory(weakref.ref(self.drafter), self._cache)

    def begin(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Read prompts or what continues them, (batch, length); see [`Drafting`]."""
        device = self.device
        if self._memory is not None and self._memory.fits(self.drafter, positions, self._window):
            cache = self._memory.cache
            cache.truncate()  # an interrupted call may have left drafted slots
        else:
            cache = RaggedCache([self._window] * self.drafter.config.num_hidden_layers)
            cache.begin(len(tokens), device)
        cache.reserve(cache.width + positions.shape[1], positions.shape[1], LEVELS)
        self._cache, self._context, self._memory = cache, CacheContext(cache), None
        self.extend(tokens, features, positions)

    def extend(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Read the next part of prompts, piece by piece; see [`PartwiseDrafting`]."""
        device, start = self.device, 0
        # each feature is read with the token after it
        tokens, positions = tokens[:, 1:], positions.to(device)
        self._cache.set_recording(False)
        while start < positions.shape[1]:
            stop = start + max(LEAST_PIECE, MASK_SIZE // (self._cache.width + LEAST_PIECE))
            piece = slice(start, min(stop, start + LARGEST_PIECE))
            self._read_piece(tokens[:, piece].to(device), features[:, piece], positions[:, piece])
            start = piece.stop
        self._cache.set_recording(True)

    def _read_piece(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Read tokens (batch, new) of prompts, each with the feature before it."""
        seen, new = positions != HIDDEN, positions.shape[1]
        mask = None  # a prompt without padding is plainly causal
        if self._cache.width or not seen.all() or (self._window or new) < new:
            causal = torch.ones(new, new, dtype=torch.bool, device=seen.device).tril()
            itself = torch.eye(new, dtype=torch.bool, device=seen.device)  # padding sees something
            mask = self._mask(positions, causal & seen[:, None] | itself)
        predicted = self._step(
            tokens, self.read(features.to(self.device)), positions.clamp(min=0), mask
        )
        self._cache.append(positions)
        self._feature = predicted[:, -1:].clone()  # a view would keep them all

    def commit(self, tokens: Tensor, features: Tensor, counts: Tensor) -> None:
        """Read tokens (batch, new) and keep the first `counts` of each row; see [`Drafting`]."""
        # prompts may stay on the CPU, and a target's last layer may be on another device
        device = self.device
        tokens, new = tokens.to(device), tokens.shape[1]
        steps = torch.arange(new, device=device)
        positions = self._cache.position_ids(steps[None])  # (batch, new)
        causal = (steps <= steps[:, None]).expand(len(tokens), -1, -1)
        # a lone node attends to all there is
        is_plain = new == 1 and self._cache.sees_all()
        mask = None if is_plain else self._mask(positions, causal)
        predicted = self._step(tokens, self.read(features.to(self.device)), positions, mask)
        last = (counts.to(device)[:, None, None] - 1).clamp(min=0)
        feature = predicted.gather(1, last.expand(-1, -1, predicted.shape[2]))
        if isinstance(self._cache, FixedCache):
            self._cache.commit(counts)
            is_new = (counts > 0)[:, None, None]
            self._feature.copy_(torch.where(is_new, feature, self._feature))
        else:
            self._cache.commit(counts.tolist())
            self._feature = feature

    def fix(self, capacity: int, shape: TreeShape, is_drawn: bool) -> tuple[Level, ...]:
        """See [`FixedDrafting`]."""
        room = max(shape.depth + 1, shape.top_k * (shape.depth - 1))
        self._cache = FixedCache(self._cache, capacity, room)
        self._context.cache = self._cache
        self._feature = self._feature.clone(memory_format=torch.contiguous_format)
        return tuple(plan_levels(shape)) if is_drawn else ()

    @property
    def device(self) -> torch.device:
        """See [`FixedDrafting`]."""
        return self.drafter.fc.weight.device

    @property
    def kind(self) -> Hashable:
        """See [`FixedDrafting`]."""
        return weakref.ref(self.drafter), self._window, self.drafter.dtype

    def forget_pass(self) -> None:
        """See [`FixedDrafting`]."""
        self._cache.truncate()

    def unfix(self, lengths: list[int]) -> None:
        """See [`FixedDrafting`]."""
        self._cache = self._context.cache = self._cache.grown(lengths)

    def select(self, rows: Tensor) -> None:
        """Keep rows of the batch, of shape (kept,); see [`Drafting`]."""
        self._cache.select(rows.tolist())
        self._feature = self._feature[rows]

    def propose(
        self,
        root: Tensor,
        shape: TreeShape,
        warp: Warp | None = None,
        chance: Uniforms | None = None,
    ) -> DraftTree:
        """Draft EAGLE-2's dynamic tree, or a drawn one, below `root` (batch,)."""
        root = root.to(self.device)
        if warp is None:
            tree = self._choose(root, shape)
        else:
            tree = self._draw(SampledTreeBuilder(root, chance), shape, warp)
        self._cache.truncate()  # what the levels wrote
        return tree

    def _draw(self, builder: SampledTreeBuilder, shape: TreeShape, warp: Warp) -> DraftTree:
        """A tree of draws without replacement among siblings."""
        features = self._feature
        seen: Tensor | None = None  # as in `_choose`
        for depth, level in enumerate(plan_levels(shape)):
            beam = builder.best(level.families)
            if depth > 0:
                seen = self._see_itself(seen, beam)
                features = self._expand(beam, features, seen, depth - 1)
            logits = self.head.logits(features, beam.log_path)  # (batch, families, vocab)
            probs = warp(logits.flatten(0, 1)).softmax(-1).view_as(logits)
            builder.draw(probs, level.children)
        return builder.build()

    def _choose(self, root: Tensor, shape: TreeShape) -> DraftTree:
        """The most confident nodes below `root` (batch,) (Li et al. 2024, sections 4.1 and 4.2)."""
        builder, features = TreeBuilder(root, shape), self._feature
        top_k = min(shape.top_k, text_config(self.target.model).vocab_size)
        log_path = features.new_zeros(features.shape[:2], dtype=torch.float32)
        beam = builder.add_level(*self.head.children(features, log_path, top_k))
        seen: Tensor | None = None  # (batch, beam, nodes that were expanded)
        for depth in range(1, shape.depth):
            if not builder.is_worth_more(beam):
                break
            seen = self._see_itself(seen, beam)
            features = self._expand(beam, features, seen, depth - 1)
            beam = builder.add_level(*self.head.children(features, beam.log_path, top_k))
        return builder.build()

    @staticmethod
    def _see_itself(seen: Tensor | None, beam: Beam) -> Tensor:
        """Let each new beam node see the expanded nodes that its parent sees, and itself.

        (batch, parents, expanded) → (batch, beam, expanded + beam); None if the parent is the root.
        """
        batch, width = beam.tokens.shape
        itself = torch.eye(width, dtype=torch.bool, device=beam.tokens.device)
        itself = itself.expand(batch, -1, -1)
        if seen is None:
            return itself
        inherited = seen.gather(1, beam.parents[..., None].expand(-1, -1, seen.shape[2]))
        return torch.cat([inherited, itself], dim=2)

    def _expand(self, beam: Beam, features: Tensor, seen: Tensor, depth: int) -> Tensor:
        """One drafter step over the beam: (batch, beam, hidden) features that its nodes predict."""
        parents = beam.parents[..., None].expand(-1, -1, features.shape[2])
        depths = seen.new_full((1, 1), depth, dtype=torch.long)
        positions = self._cache.position_ids(depths)  # (batch, 1)
        mask = self._mask(positions.expand(seen.shape[:2]), seen)
        return self._step(beam.tokens, features.gather(1, parents), positions, mask)

    def _mask(self, positions: Tensor, own: Tensor) -> Tensor:
        """The mask of a step, (batch, new, slots + new); see [`RaggedCache.mask`]."""
        return self._cache.mask(positions, own, self._dtype, self._window)

    def _step(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """One drafter step: what it predicts after each token, (batch, new, hidden).

        Args:
            tokens: (batch, new).
            features: (batch, new, hidden), before each token.
            positions: (batch, new) or (batch, 1).
            mask: (batch, new, slots + new), added to scores; None: tokens see all before them.
        """
        self._context.mask = None if mask is None else mask[:, None]
        embeddings = self.embed(tokens).to(self.device)
        return self.drafter(embeddings, features, positions, self._context)
