"""One call of `generate`: trees level by level, and drafters that keep the last feature alone.

In: by a family, what the drafter makes of a root and of the best nodes of a level. Out: a
`DraftTree`, of the most confident nodes or of drawn ones.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..decoding.drafting import DraftTree, Level, TreeShape, Warp
from ..decoding.guard import accept_features
from ..heads.draft_heads import DraftHead
from ..target import FEATURE, Target, check_target, text_config
from .model import Drafter
from .tree_builders import Beam, SampledTreeBuilder, TreeBuilder, plan_levels


class Grown(NamedTuple):
    """What is known of the nodes that are expanded next."""

    features: Tensor  # (batch, beam, hidden), in which the head finds their children
    seen: Tensor | None = None  # (batch, beam, nodes that were expanded), where nodes attend


class OneCall(ABC):
    """What the drafting side of a call has in all families; see [`FixedDrafting`]."""

    drafter: PreTrainedModel
    target: Target
    head: DraftHead

    @property
    def device(self) -> torch.device:
        """See [`FixedDrafting`]."""
        return self.drafter.device

    @property
    def kind(self) -> Hashable:
        """See [`FixedDrafting`]."""
        return weakref.ref(self.drafter), self.drafter.dtype

    def fix(self, capacity: int, shape: TreeShape, is_drawn: bool) -> tuple[Level, ...]:
        """See [`FixedDrafting`]."""
        return tuple(plan_levels(shape)) if is_drawn else ()


class TreeDrafting(OneCall):
    """Trees level by level; a family says how its steps go and what reads them."""

    @abstractmethod
    def _start(self, root: Tensor) -> Grown:
        """What level 1 below `root` (batch,) is drafted from."""

    @abstractmethod
    def _grow(self, grown: Grown, beam: Beam, depth: int) -> Grown:
        """One drafter step over a beam of nodes at `depth`; `grown` is of their parents."""

    def propose(
        self, root: Tensor, shape: TreeShape, warp: Warp | None = None, chance: Any = None
    ) -> DraftTree:
        """Draft EAGLE-2's dynamic tree, or a drawn one, below `root` (batch,)."""
        root = root.to(self.device)
        return self._choose(root, shape) if warp is None else self._draw(root, shape, warp, chance)

    def _draw(self, root: Tensor, shape: TreeShape, warp: Warp, chance: Any) -> DraftTree:
        """A tree of draws without replacement among siblings, below `root` (batch,)."""
        builder, grown = SampledTreeBuilder(root, chance), self._start(root)
        for depth, level in enumerate(plan_levels(shape)):
            beam = builder.best(level.families, shape.node_floor * level.children)
            if depth > 0:
                if not beam.is_worth(shape.level_floor):
                    break
                grown = self._grow(grown, beam, depth)
            logits = self.head.logits(grown.features, beam.log_path)  # (batch, families, vocab)
            builder.draw(warped(logits, warp), level.children)
        return builder.build()

    def _choose(self, root: Tensor, shape: TreeShape) -> DraftTree:
        """The most confident nodes below `root` (batch,) (Li et al. 2024, sections 4.1 and 4.2)."""
        builder, grown = TreeBuilder(root, shape), self._start(root)
        log_path = torch.zeros(len(root), 1, dtype=torch.float32, device=root.device)
        beam = builder.add_level(*self.head.children(grown.features, log_path, shape.top_k))
        for depth in range(1, shape.depth):
            if not beam.is_worth(shape.level_floor):
                break
            grown = self._grow(grown, beam, depth)
            children = self.head.children(grown.features, beam.log_path, shape.top_k)
            beam = builder.add_level(*children)
        return builder.build()


def warped(logits: Tensor, warp: Warp) -> Tensor:
    """The distribution that is drawn from, (rows, nodes, vocab) as the logits."""
    return warp(logits.flatten(0, 1)).softmax(-1).view_as(logits)


def last_kept(states: Tensor, counts: Tensor) -> Tensor:
    """Of states (batch, new, width) those of the last of `counts` (batch,): (batch, 1, width)."""
    last = (counts.to(states.device)[:, None, None] - 1).clamp(min=0)
    return states.gather(1, last.expand(-1, -1, states.shape[2]))


class MarginalDrafting(OneCall):
    """Trees where all nodes of a level have the same children; a level more costs no step."""

    @abstractmethod
    def _outputs(self, levels: int) -> Tensor:
        """What the head reads of the first levels, as far as there are: (levels, batch, hidden)."""

    def propose(
        self, root: Tensor, shape: TreeShape, warp: Warp | None = None, chance: Any = None
    ) -> DraftTree:
        """Draft the paths of the largest products of marginals, or drawn ones, below `root`.

        Each q is known before a token of the tree is, so drawing from it and testing is exact.

        Args:
            root: (batch,).
            shape, warp, chance: see [`FixedDrafting`].
        """
        outputs, root = self._outputs(shape.depth), root.to(self.device)
        shape = shape._replace(depth=len(outputs))
        log_path = outputs.new_zeros(outputs.shape[:2], dtype=torch.float32)  # (levels, batch)
        if warp is not None:
            probs = warped(self.head.logits(outputs, log_path), warp)  # (levels, batch, vocab)
            drawn = SampledTreeBuilder(root, chance)
            for level, own in zip(plan_levels(shape), probs, strict=False):
                beam = drawn.best(level.families, shape.node_floor * level.children)
                families = own[:, None].expand(-1, beam.tokens.shape[1], -1)
                drawn.draw(families, level.children)
            return drawn.build()
        builder, width = TreeBuilder(root, shape), 1
        children = self.head.children(outputs, log_path, shape.top_k)  # (levels, batch, top_k) each
        for pair in zip(*children, strict=True):
            tokens, confidence = (one[:, None].expand(-1, width, -1) for one in pair)
            width = builder.add_level(tokens, confidence).tokens.shape[1]
        return builder.build()


class LastFeatureDrafting(OneCall):
    """Keeps the feature before each root, and no cache; a family says how it drafts from it.

        tokens          x0   x1   x2   x3        x3 is the root, which the target has not read
        features        f0   f1   f2             a round starts from f2, and from nothing before it

    A call that continues another reads a new feature. See [`FixedDrafting`].
    """

    layers: tuple[int, ...] = (FEATURE,)
    _feature: Tensor  # (batch, hidden), in one buffer unless rows leave

    def __init__(self, drafter: Drafter, target: Target, memory: None = None):
        accept_features(target.model)
        check_target(drafter.config, target.model, takes_other_vocabulary=True)
        self.drafter, self.target = drafter, target
        self._num_tokens = text_config(target.model).vocab_size

    def begin(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Take the last feature of prompts, (batch, length, hidden); see [`Drafting`]."""
        self._feature = features[:, -1].to(self.device, copy=True)

    def commit(self, tokens: Tensor, features: Tensor, counts: Tensor) -> None:
        """Take the feature before each row's newest token; see [`Drafting`].

        Of (batch, new, hidden) features, that of the last of `counts`, (batch,).
        """
        new, counts = last_kept(features.to(self.device), counts)[:, 0], counts.to(self.device)
        self._feature.copy_(torch.where(counts[:, None] > 0, new, self._feature))

    def select(self, rows: Tensor) -> None:
        """Keep rows of the batch, of shape (kept,); see [`Drafting`]."""
        self._feature = self._feature[rows]

    def memory(self) -> None:
        """Return None: there is nothing that a continued call does not read anew."""

    def unfix(self, lengths: list[int]) -> None:
        """See [`FixedDrafting`]."""
