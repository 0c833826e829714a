"""Trees that are drafted level by level: the most confident nodes, or drawn ones.

In: by a family, what the drafter makes of a root and of the best nodes of a level. Out: a
`DraftTree`.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ..decoding.chance import Uniforms
from ..decoding.drafting import DraftTree, TreeShape, Warp
from ..heads.draft_heads import DraftHead
from ..target import Target, text_config
from .tree_builders import Beam, SampledTreeBuilder, TreeBuilder, plan_levels


class Grown(NamedTuple):
    """What is known of the nodes that are expanded next."""

    features: Tensor  # (batch, beam, hidden), in which the head finds their children
    seen: Tensor | None = None  # (batch, beam, nodes that were expanded), where nodes attend


class TreeDrafting(ABC):
    """Trees of one call of `generate`; a family says how its steps go and what reads them."""

    target: Target
    head: DraftHead

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """See [`FixedDrafting`]."""

    @abstractmethod
    def _start(self, root: Tensor) -> Grown:
        """What level 1 below `root` (batch,) is drafted from."""

    @abstractmethod
    def _grow(self, grown: Grown, beam: Beam, depth: int) -> Grown:
        """One drafter step over a beam of nodes at `depth`; `grown` is of their parents."""

    def _builder(self, root: Tensor, shape: TreeShape) -> TreeBuilder:
        """What keeps the nodes below `root` (batch,) that are chosen."""
        return TreeBuilder(root, shape)

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
            return self._choose(root, shape)
        return self._draw(root, shape, warp, chance)

    def _draw(
        self, root: Tensor, shape: TreeShape, warp: Warp, chance: Uniforms | None
    ) -> DraftTree:
        """A tree of draws without replacement among siblings, below `root` (batch,)."""
        builder, grown = SampledTreeBuilder(root, chance), self._start(root)
        for depth, level in enumerate(plan_levels(shape)):
            beam = builder.best(level.families)
            if depth > 0:
                grown = self._grow(grown, beam, depth)
            logits = self.head.logits(grown.features, beam.log_path)  # (batch, families, vocab)
            probs = warp(logits.flatten(0, 1)).softmax(-1).view_as(logits)
            builder.draw(probs, level.children)
        return builder.build()

    def _choose(self, root: Tensor, shape: TreeShape) -> DraftTree:
        """The most confident nodes below `root` (batch,) (Li et al. 2024, sections 4.1 and 4.2)."""
        builder, grown = self._builder(root, shape), self._start(root)
        top_k = min(shape.top_k, text_config(self.target.model).vocab_size)
        log_path = torch.zeros(len(root), 1, dtype=torch.float32, device=root.device)
        beam = builder.add_level(*self.head.children(grown.features, log_path, top_k))
        for depth in range(1, shape.depth):
            if not builder.is_worth_more(beam):
                break
            grown = self._grow(grown, beam, depth)
            beam = builder.add_level(*self.head.children(grown.features, beam.log_path, top_k))
        return builder.build()


def last_kept(states: Tensor, counts: Tensor) -> Tensor:
    """Of states (batch, new, width) those of the last of `counts` (batch,): (batch, 1, width)."""
    last = (counts.to(states.device)[:, None, None] - 1).clamp(min=0)
    return states.gather(1, last.expand(-1, -1, states.shape[2]))
