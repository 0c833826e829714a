"""Medusa's side of a call: all heads read one feature, and a tree is made of what they say.

    tokens          x0   x1   x2   x3        x3 is the root, which the target has not read
    features        f0   f1   f2             of f2: the target's LM head gave x3,
                                             head 1 gives level 1, head 2 level 2, …

Nothing but the last feature is remembered: a call that continues another reads a new one.
"""

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...decoding.chance import Uniforms
from ...decoding.drafting import PADDING, DraftTree, Level, TreeShape, Warp, host_tensor
from ...heads.ranking import rank
from ...target import Target
from ..last_feature import LastFeatureDrafting
from ..tree_builders import chosen_of_marginals, drawn_of_marginals, plan_levels
from .configuration import Paths
from .modeling import MedusaDrafter


class StaticTree:
    """A tree whose nodes are ranks of tokens, the same in each round.

    `tokens` of a node: its rank among those of its level.
    """

    def __init__(self, paths: Paths, device: torch.device):
        place = {tuple(path): index for index, path in enumerate(paths, 1)}
        self.depth = max(map(len, paths))
        self.top_k = 1 + max(map(max, paths))
        self._branching = max(sum(path[:-1] == one for path in place) for one in [(), *place])
        columns = [(len(p), p[-1], place.get(p[:-1], 0), max(p)) for p in place]
        # (nodes - 1,) each, the root left out
        columns = host_tensor(columns).to(device).unbind(1)
        self._depths, self._ranks, self._parents, self._highest = columns

    def build(self, root: Tensor, shape: TreeShape, tokens: Tensor) -> DraftTree:
        """Fill the nodes that a shape has room for; others are padding.

        Args:
            root: (batch,).
            tokens: (levels, batch, top_k), best first.
        """
        kept, levels = slice(shape.nodes - 1), len(tokens)
        depths, ranks = self._depths[kept], self._ranks[kept]
        places = (depths - 1).clamp(max=levels - 1) * tokens.shape[2] + ranks
        chosen = tokens.transpose(0, 1).flatten(1)[:, places]  # (batch, nodes - 1)
        is_node = (depths <= shape.depth) & (self._highest[kept] < shape.top_k)
        parents = self._parents[kept].masked_fill(~is_node, PADDING)
        parents, depths = (F.pad(one, (1, 0)).expand(len(root), -1) for one in (parents, depths))
        tokens = torch.cat([root[:, None], chosen], dim=1)
        return DraftTree(tokens, parents, depths, levels=levels, branching=self._branching)


class MedusaDrafting(LastFeatureDrafting):
    """Drafts for one call of `generate` with a [`MedusaDrafter`]; see [`FixedDrafting`]."""

    drafter: MedusaDrafter

    def __init__(self, drafter: MedusaDrafter, target: Target, memory: None = None):
        super().__init__(drafter, target)
        choices = drafter.config.tree_choices
        self._static = None if choices is None else StaticTree(choices, self.device)

    @property
    def kind(self) -> Hashable:
        """See [`FixedDrafting`]."""
        return super().kind, str(self.drafter.config.tree_choices)

    def propose(
        self,
        root: Tensor,
        shape: TreeShape,
        warp: Warp | None = None,
        chance: Uniforms | None = None,
    ) -> DraftTree:
        """Draft a tree below `root` (batch,): the static one, the most confident, or a drawn one.

        Each node of a level has the same children, and q of a drawn one is its head's softmax.
        """
        root, shape = root.to(self.device), self._fitted(shape)
        static = self._static if warp is None else None
        if static is not None:
            shape = shape._replace(depth=min(shape.depth, static.depth))
        logits = self._logits(shape.depth)
        if warp is not None:
            probs = warp(logits.flatten(0, 1)).softmax(-1).view_as(logits)
            return drawn_of_marginals(root, shape, probs, chance)
        top_k = shape.top_k if static is None else static.top_k
        tokens, log_probs = rank(logits, min(top_k, self._num_tokens))
        if static is not None:
            return static.build(root, shape, tokens)
        return chosen_of_marginals(root, shape, tokens, log_probs)

    def _fitted(self, shape: TreeShape) -> TreeShape:
        """A shape no deeper than there are heads."""
        return shape._replace(depth=min(shape.depth, self.drafter.config.num_heads))

    def _logits(self, levels: int) -> Tensor:
        """Logits of the first heads over the target's tokens, in fp32: (levels, batch, vocab)."""
        states = self.drafter(self._feature, levels)
        logits = self.drafter.logits(states, self.target.head).float()
        # tokens that the target has gained since are not drafted, those it has lost are cut
        added = self._num_tokens - logits.shape[-1]
        return F.pad(logits, (0, added), value=float("-inf")) if added else logits

    def fix(self, capacity: int, shape: TreeShape, is_drawn: bool) -> tuple[Level, ...]:
        """See [`FixedDrafting`]: the feature is in one buffer anyway."""
        return tuple(plan_levels(self._fitted(shape))) if is_drawn else ()
