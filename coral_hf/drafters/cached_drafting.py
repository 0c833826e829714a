"""The drafting side of a call, of drafters with a KV cache: what they have read, and their trees.

In: committed tokens, and of a `FeatureDrafting` the target's features. Out: a `DraftTree` a round.
A family says how a step goes, and by which head its output is read.

    a step reads      a level's nodes, and the outputs of its step for their parents
    a node attends    to what is committed, to its ancestors and to itself
"""

import weakref
from abc import abstractmethod
from collections.abc import Hashable
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..decoding.caches.fixed_cache import FixedCache
from ..decoding.caches.ragged_cache import HIDDEN, RaggedCache
from ..decoding.drafting import DraftTree, Level, TreeShape
from ..decoding.guard import accept_features
from ..heads.draft_heads import DraftHead
from ..target import Target, check_target
from .layers import CacheContext
from .model import Drafter
from .tree_builders import Beam
from .tree_drafting import Grown, TreeDrafting, last_kept

# tokens of a prompt that are read at once, so that masks and activations do not grow with it
LEAST_PIECE, LARGEST_PIECE = 128, 256
MASK_SIZE = 2**20  # of a piece's mask, one row's
LEAST_WINDOW = 32  # holds the levels of any tree

Windows = list[int | None]  # of each layer, None for full attention


class DrafterMemory(NamedTuple):
    """What a drafter has read of sequences that may continue; it travels with their cache."""

    drafter: weakref.ref
    cache: RaggedCache

    def __reduce__(self) -> tuple:
        """A cache is saved without it: where it is loaded, the drafter is another object."""
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> "DrafterMemory":
        return DrafterMemory(self.drafter, deepcopy(self.cache, memo))


class CachedDrafting(TreeDrafting):
    """Drafts for one call of `generate`; a family says how its steps go and what reads them.

    Args:
        drafter: shared by calls; all state of this call is here.
        target: what the drafter reads of its target.
        windows: committed tokens that each layer of the drafter attends to, and so keeps.
        memory: of an earlier call; ignored where the sequences do not continue it.
    """

    layers: tuple[int, ...]
    # positions by which the next token that the drafter reads is ahead of the target's next feature
    lead: ClassVar[int] = 0
    _output: Tensor  # (batch, 1, hidden), of the step that has read the root; may hold more

    def __init__(
        self,
        drafter: PreTrainedModel,
        target: Target,
        windows: Windows,
        memory: DrafterMemory | None,
    ):
        self.drafter, self.target = drafter, target
        self._dtype, self._memory, self._windows = drafter.dtype, memory, windows
        self._narrowest = min((window for window in windows if window), default=None)

    @abstractmethod
    def _begin(self, tokens: Tensor, features: Tensor, positions: Tensor, is_new: bool) -> None:
        """Read what [`begin`] got, shapes too; `is_new`: not what continues a memory."""

    @abstractmethod
    def _step(self, tokens: Tensor, states: Tensor, positions: Tensor, mask: Any) -> Tensor:
        """One step of the drafter, behind what its cache holds: (batch, new, hidden).

        Args:
            tokens: (batch, new).
            states: (batch, new, hidden), features or outputs of the step before each token.
            positions: (batch or 1, new or 1).
            mask: of `_mask`; None: tokens see all before them.
        """

    def _mask(self, positions: Tensor, own: Tensor) -> Any:
        """The mask of a step, (batch, new, slots + new); see [`RaggedCache.mask`]."""
        return self._cache.mask(positions, own, self._dtype, self._narrowest)

    def read(self, features: Tensor) -> Tensor:
        """What a step reads of features (batch, new, width): (batch, new, hidden)."""
        return features

    def memory(self) -> DrafterMemory:
        """Return what was read so far, for a call that continues the same sequences."""
        return DrafterMemory(weakref.ref(self.drafter), self._cache)

    def begin(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Read prompts or what continues them, (batch, length); see [`Drafting`]."""
        memory, self._memory = self._memory, None
        is_new = memory is None or not self._continues(memory, positions[:, 0] + self.lead)
        if memory is None or is_new:
            self._cache = RaggedCache(self._windows)
            self._cache.begin(len(tokens), self.device)
        else:
            self._cache = memory.cache
            self._cache.truncate()  # an interrupted call may have left drafted slots
        self._begin(tokens, features, positions, is_new)

    def _continues(self, memory: DrafterMemory, starts: Tensor) -> bool:
        """Whether sequences that begin at `starts`, (batch,), continue those of a memory."""
        ends = memory.cache.next_positions
        return (
            memory.drafter() is self.drafter
            and [layer.window for layer in memory.cache.layers] == self._windows
            and len(ends) == len(starts)
            and bool((ends.to(starts.device) == starts).all())
        )

    def _read(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Read parts of prompts piece by piece, (batch, new) tokens and their positions."""
        device, start = self.device, 0
        positions = positions.to(device)
        self._cache.set_recording(False)
        while start < positions.shape[1]:
            stop = start + max(LEAST_PIECE, MASK_SIZE // (self._cache.width + LEAST_PIECE))
            piece = slice(start, min(stop, start + LARGEST_PIECE))
            own, read = positions[:, piece], self.read(features[:, piece].to(device))
            seen, new, mask = own != HIDDEN, own.shape[1], None
            # a prompt without padding is plainly causal
            if self._cache.width or not seen.all() or (self._narrowest or new) < new:
                causal = torch.ones(new, new, dtype=torch.bool, device=device).tril()
                itself = torch.eye(new, dtype=torch.bool, device=device)  # padding sees something
                mask = self._mask(own, causal & seen[:, None] | itself)
            predicted = self._step(tokens[:, piece].to(device), read, own.clamp(min=0), mask)
            self._cache.append(own)
            self._output = predicted[:, -1:].clone()  # a view would keep them all
            start = piece.stop
        self._cache.set_recording(True)

    def commit(self, tokens: Tensor, features: Tensor, counts: Tensor) -> None:
        """Read tokens (batch, new) and keep the first `counts` of each row; see [`Drafting`]."""
        # prompts may stay on the CPU, and a target's last layer may be on another device
        tokens, new = tokens.to(self.device), tokens.shape[1]
        steps = torch.arange(new, device=self.device)
        positions = self._cache.position_ids(steps[None])  # (batch, new)
        causal = (steps <= steps[:, None]).expand(len(tokens), -1, -1)
        # a lone node attends to all there is
        mask = None if new == 1 and self._cache.sees_all() else self._mask(positions, causal)
        predicted = self._step(tokens, self.read(features.to(self.device)), positions, mask)
        self._keep(last_kept(predicted, counts), counts)

    def _keep(self, output: Tensor, counts: Tensor) -> None:
        """Keep the first `counts` tokens of each row, and an output (batch, some, hidden)."""
        if isinstance(self._cache, FixedCache):
            self._cache.commit(counts)
            is_new = (counts > 0)[:, None, None]
            self._output.copy_(torch.where(is_new, output, self._output))
        else:
            self._cache.commit(counts.tolist())
            self._output = output

    def fix(self, capacity: int, shape: TreeShape, is_drawn: bool) -> tuple[Level, ...]:
        """See [`FixedDrafting`]."""
        self._cache = FixedCache(self._cache, capacity, self._room(shape), shape.depth + 1)
        self._output = self._output.clone(memory_format=torch.contiguous_format)
        return super().fix(capacity, shape, is_drawn)

    def _room(self, shape: TreeShape) -> int:
        """Tokens of passes between two commits, at most."""
        return max(shape.depth + 1, shape.top_k * (shape.depth - 1))

    @property
    def kind(self) -> Hashable:
        """See [`FixedDrafting`]."""
        return super().kind, *self._windows

    def unfix(self, lengths: list[int]) -> None:
        """See [`FixedDrafting`]."""
        self._cache = self._cache.grown(lengths)

    def select(self, rows: Tensor) -> None:
        """Keep rows of the batch, of shape (kept,); see [`Drafting`]."""
        self._cache.select(rows.tolist())
        self._output = self._output[rows]

    def propose(self, *args, **kwargs) -> DraftTree:
        """Draft a tree, and forget what its levels wrote; see [`TreeDrafting`]."""
        tree = super().propose(*args, **kwargs)
        self._cache.truncate()
        return tree

    def _start(self, root: Tensor) -> Grown:
        return Grown(self._output)

    def _grow(self, grown: Grown, beam: Beam, depth: int) -> Grown:
        """One step over the beam, whose nodes see what their parents see, and themselves."""
        batch, width = beam.tokens.shape
        seen = torch.eye(width, dtype=torch.bool, device=beam.tokens.device).expand(batch, -1, -1)
        if grown.seen is not None:  # the parent is not the root: (batch, beam, expanded + beam)
            seen = torch.cat([beam.of_parents(grown.seen), seen], dim=2)
        depths = seen.new_full((1, 1), depth - 1, dtype=torch.long)
        positions = self._cache.position_ids(depths)  # (batch, 1)
        mask = self._mask(positions.expand(batch, width), seen)
        states = beam.of_parents(grown.features)
        return Grown(self._step(beam.tokens, states, positions, mask), seen)


class FeatureDrafting(CachedDrafting):
    """Of drafters that predict hidden states of their target; a family says by which head.

    f̂ is what the drafter's step returns, which the next step reads in the place of a feature.

        committed tokens     x0       x1       x2       x3
        target features      f0       f1       f2
        begin reads          (x1,f0)  (x2,f1)  (x3,f2)        the last output, f̂3, gives level 1
        a level reads        (node, its parent's f̂)           and gives the next level

    Args:
        drafter, target, memory: see [`CachedDrafting`].
        draft_head: one of `DRAFT_HEADS`; the drafter's own choice by default.
        draft_window: committed tokens that the drafter attends to, and so keeps; all by default, or
            `draft_window` of its `generation_config`.
    """

    drafter: Drafter
    options = ("draft_head", "draft_window")

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
        window = draft_window or getattr(drafter.generation_config, "draft_window", None)
        if window is not None and window < LEAST_WINDOW:
            raise ValueError(
                f"`draft_window` is {window}; use at least {LEAST_WINDOW} tokens, or None for all."
            )
        super().__init__(drafter, target, [window] * drafter.config.num_hidden_layers, memory)
        self._head_name = draft_head or drafter.config.draft_head
        self.head = self._bind(draft_head)

    @abstractmethod
    def _bind(self, name: str | None) -> DraftHead:
        """The draft head of a name, the drafter's own choice by default."""

    @property
    def kind(self) -> Hashable:
        """See [`FixedDrafting`]."""
        return super().kind, self._head_name

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens (batch, new) as a step reads them: (batch, new, hidden)."""
        return self.target.embed(tokens)

    def _begin(self, tokens: Tensor, features: Tensor, positions: Tensor, is_new: bool) -> None:
        self._read(tokens[:, 1:], features, positions)  # each feature with the token after it

    def _step(self, tokens: Tensor, states: Tensor, positions: Tensor, mask: Any) -> Tensor:
        """See [`CachedDrafting`]; `mask` is (batch, new, slots + new), added to scores."""
        context = CacheContext(self._cache, None if mask is None else mask[:, None])
        return self.drafter(self.embed(tokens).to(self.device), states, positions, context)
