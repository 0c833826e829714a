"""Builders of draft trees: chosen by confidence, or sampled from the drafter's distribution.

In: for each level, children of the nodes that were expanded, or the distribution after them. Out: a
`DraftTree`.

`TreeBuilder` (EAGLE-2, Li et al. 2024, sections 4.1 and 4.2): the most confident nodes of a level
are expanded, the most confident nodes of all are verified.

`SampledTreeBuilder`: what a node gets is decided before it is drawn: the shape of a level by
`plan_levels` from the numbers of `TreeShape`, the nodes to expand, as far as they pay, from the
tokens above them. So each family of siblings is a draw without replacement from its own q, which
verification takes for granted; a drawn child is never dropped.

    nodes 31, depth 4, top_k 2      level     1   2   3   4
                                    nodes     2   4   8   16       a full binary tree
    nodes 21, depth 5, top_k 4      nodes     4   4   4   4    4   one family a level
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..decoding.chance import Chance, Uniforms
from ..decoding.drafting import PADDING, DraftTree, Level, TreeShape


class Beam(NamedTuple):
    """The nodes of the newest level that are worth expanding."""

    tokens: Tensor  # (batch, beam)
    parents: Tensor  # (batch, beam), which node of the previous beam each one hangs on
    log_path: Tensor  # (batch, beam), log-confidence of the path from the root

    def is_worth(self, floor: float) -> bool:
        """Whether to draft the level below, on average over the batch.

        Each node of the beam that is accepted gives one more accepted node at most.
        """
        return floor == 0 or float(self.log_path.exp().sum(1).mean()) >= floor

    def of_parents(self, states: Tensor) -> Tensor:
        """What each node's parent has: (batch, parents, width) → (batch, beam, width)."""
        return states.gather(1, self.parents[..., None].expand(-1, -1, states.shape[2]))


class TreeBuilder:
    """Collects levels of children and keeps the best nodes of all.

    A child's confidence is at most its parent's, and ties go to the earlier node, so the nodes
    that are kept always form a tree.
    """

    def __init__(self, root: Tensor, shape: TreeShape):
        """Start at the root's token, (batch,)."""
        self._root, self._shape = root, shape
        self._tokens: list[Tensor] = []  # each (batch, nodes of a level)
        self._log_paths: list[Tensor] = []
        self._parents: list[Tensor] = []  # pool indices, the root is -1
        self._size = 0
        # (batch, beam), pool indices of the newest beam
        self._beam_nodes = torch.full_like(root, -1)[:, None]
        self._beam_log_path = torch.zeros(root.shape[0], 1, dtype=torch.float32, device=root.device)

    def add_level(self, tokens: Tensor, log_confidence: Tensor) -> Beam:
        """Add the children of the newest beam, and choose the next beam among them.

        Both are (batch, beam, top_k).
        """
        # (batch, beam * top_k)
        log_paths = (self._beam_log_path[..., None] + log_confidence).flatten(1)
        tokens, top_k = tokens.flatten(1), tokens.shape[-1]
        parents = self._beam_nodes.repeat_interleave(top_k, dim=1)
        best, index = log_paths.topk(min(self._shape.top_k, log_paths.shape[1]), dim=1)
        beam = Beam(tokens.gather(1, index), index // top_k, best)
        self._beam_nodes, self._beam_log_path = self._size + index, best
        self._tokens.append(tokens)
        self._parents.append(parents)
        self._log_paths.append(log_paths)
        self._size += tokens.shape[1]
        return beam

    def build(self) -> DraftTree:
        """The root and the best nodes of the pool, in the order in which they were added."""
        log_paths = torch.cat(self._log_paths, dim=1)  # (batch, pool)
        # stable: of equal nodes the earlier, so a parent is kept before its child
        ranked, order = log_paths.sort(dim=1, descending=True, stable=True)
        kept, floor = min(self._shape.nodes - 1, ranked.shape[1]), self._shape.node_floor
        if floor > 0:  # the target's pass is as wide as its widest row: equal ranks count together
            kept = min(kept, int((ranked.exp().mean(0) >= floor).sum()))
        chosen = order[:, :kept].sort(dim=1).values  # (batch, kept)
        # pool indices → node ids, the root's -1 becoming 0
        node_of = chosen.new_zeros(chosen.shape[0], self._size + 1)
        ids = torch.arange(1, kept + 1, device=chosen.device).expand_as(chosen)
        node_of.scatter_(1, chosen + 1, ids)
        parents = node_of.gather(1, torch.cat(self._parents, dim=1).gather(1, chosen) + 1)
        tokens = torch.cat(self._tokens, dim=1).gather(1, chosen)
        depths = _depths(self._tokens, first=1).gather(1, chosen)
        root = torch.zeros_like(self._root)[:, None]
        # a head that read few tokens has fewer children than were asked for
        log_confidence = log_paths.gather(1, chosen)
        is_node = log_confidence > float("-inf")
        return DraftTree(
            torch.cat([self._root[:, None], tokens], dim=1),
            torch.cat([root, parents.masked_fill(~is_node, PADDING)], dim=1),
            torch.cat([root, depths], dim=1),
            levels=len(self._tokens),
            branching=self._shape.top_k,
            log_confidence=log_confidence,
        )


def _depths(levels: list[Tensor], first: int = 0) -> Tensor:
    """The depth of each node of some levels, (batch, nodes of the level) each: (batch, nodes)."""
    return torch.cat([torch.full_like(x, depth) for depth, x in enumerate(levels, first)], dim=1)


def plan_levels(shape: TreeShape) -> list[Level]:
    """Each level takes its equal share of the nodes that are left, in whole families."""
    left, width, levels = shape.nodes - 1, 1, []
    for depth in range(shape.depth):
        share = max(left // (shape.depth - depth), 1)
        children = min(shape.top_k, share)
        families = min(width, share // children)
        if left < children:
            break
        levels.append(Level(families, children))
        width = families * children
        left -= width
    return levels


class SampledTreeBuilder:
    """Draws level after level below a root."""

    def __init__(self, root: Tensor, chance: Chance | Uniforms | None = None):
        """Start at the root's token, (batch,); `chance` is where draws come from."""
        zeros = torch.zeros_like(root)[:, None]
        # of each level, (batch, nodes of the level); log-probabilities are -inf for padding
        self._tokens, self._parents, self._log_paths = [root[:, None]], [zeros], [zeros.float()]
        self._plan: list[Level] = []
        self._expanded: list[tuple[Tensor, Tensor]] = []  # nodes (batch, families), and their q
        self._size, self._chance = 1, chance or Chance()

    def best(self, families: int, floor: float = 0.0) -> Beam:
        """The most probable nodes of the newest level, which are to get children.

        Those below `floor` are left out if no row of the batch has so many above it.
        """
        newest, siblings = self._log_paths[-1], self._plan[-1].children if self._plan else 1
        log_path, index = newest.topk(min(families, newest.shape[1]), dim=1)
        if floor > 0:
            above = max(int((log_path.exp() >= floor).sum(1).max()), 1)
            log_path, index = log_path[:, :above], index[:, :above]
        self._beam, self._beam_log_path = self._size - newest.shape[1] + index, log_path
        return Beam(self._tokens[-1].gather(1, index), index // siblings, log_path)

    def draw(self, probs: Tensor, children: int) -> None:
        """Draw children of the nodes that `best` named, without replacement among siblings.

        Args:
            probs: (batch, families, vocab), q after each of them.
            children: of each; a q with fewer tokens gives as many as it has.
        """
        tokens, is_there = self._chance.draw_siblings(probs, children)
        drawn = probs.gather(2, tokens)  # (batch, families, children)
        log_path = self._beam_log_path[..., None] + drawn.log()
        is_node = is_there & (log_path > float("-inf"))
        parents = self._beam[..., None].expand_as(tokens).masked_fill(~is_node, PADDING)
        self._expanded.append((self._beam, probs))
        self._tokens.append(tokens.flatten(1))
        self._parents.append(parents.flatten(1))
        self._log_paths.append(log_path.masked_fill(~is_node, float("-inf")).flatten(1))
        self._size += self._log_paths[-1].shape[1]
        self._plan.append(Level(probs.shape[1], children))

    def build(self) -> DraftTree:
        """Join all levels, siblings in the order of the draws; q is (batch, nodes, vocab)."""
        batch, _, vocab = self._expanded[0][1].shape
        draft_probs = self._expanded[0][1].new_zeros(batch, self._size, vocab)
        for nodes, probs in self._expanded:
            draft_probs.scatter_(1, nodes[..., None].expand_as(probs), probs)
        return DraftTree(
            torch.cat(self._tokens, dim=1),
            torch.cat(self._parents, dim=1),
            _depths(self._tokens),
            draft_probs,
            "without_replacement",
            levels=len(self._expanded),
            branching=max(level.children for level in self._plan),
            plan=tuple(self._plan),
            log_confidence=torch.cat(self._log_paths[1:], dim=1),
        )
