"""Trees whose tokens are drawn from the drafter's distribution instead of chosen.

In: for each level, the drafter's distribution after the nodes that are expanded. Out: a `DraftTree`
with `draft_probs`. What a node gets is decided before it is drawn: the shape of a level from the
numbers of `TreeShape`, the nodes to expand from the tokens above them. So each family of siblings
is a draw without replacement from its own q, which is what the rules of verification take for
granted; a drawn child is never dropped.

    nodes 31, depth 4, top_k 2      level     1   2   3   4
                                    nodes     2   4   8   16       a full binary tree
    nodes 21, depth 5, top_k 4      nodes     4   4   4   4    4   one family a level
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .tree import PADDING, Beam, DraftTree, TreeShape


class Level(NamedTuple):
    """How many nodes of the level above get how many children each."""

    families: int
    children: int


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


class DrawnTreeBuilder:
    """Draws level after level below a root."""

    def __init__(self, root: Tensor):
        """Start at the root's token, (batch,)."""
        zeros = torch.zeros_like(root)[:, None]
        self._tokens = [root[:, None]]  # each (batch, nodes of a level)
        self._parents = [zeros]
        self._depths = [zeros]
        self._size, self._children = 1, 1
        # (batch, nodes of the newest level): log-probability of the path; -inf for padding
        self._log_path = torch.zeros(root.shape, device=root.device)[:, None]
        self._expanded: list[tuple[Tensor, Tensor]] = []  # nodes (batch, families), and their q

    def best(self, families: int) -> Beam:
        """The most probable nodes of the newest level, which are to get children."""
        log_path, index = self._log_path.topk(families, dim=1)
        first = self._size - self._log_path.shape[1]
        self._beam, self._beam_log_path = first + index, log_path
        return Beam(self._tokens[-1].gather(1, index), index // self._children, log_path)

    def draw(self, probs: Tensor, children: int) -> None:
        """Draw children of the nodes that `best` named, without replacement among siblings.

        Args:
            probs: (batch, families, vocab), q after each of them.
            children: of each; a q with fewer tokens gives as many as it has.
        """
        # the largest of log q + Gumbel noise are draws in order (Kool et al. 2019, section 3)
        noise = -torch.empty_like(probs).exponential_().log()
        perturbed, tokens = (probs.log() + noise).topk(children, dim=2)
        drawn = probs.gather(2, tokens)  # (batch, families, children)
        log_path = self._beam_log_path[..., None] + drawn.log()
        is_node = (perturbed > float("-inf")) & (log_path > float("-inf"))
        parents = self._beam[..., None].expand_as(tokens).masked_fill(~is_node, PADDING)
        self._expanded.append((self._beam, probs))
        self._tokens.append(tokens.flatten(1))
        self._parents.append(parents.flatten(1))
        self._depths.append(torch.full_like(self._tokens[-1], len(self._depths)))
        self._log_path = log_path.masked_fill(~is_node, float("-inf")).flatten(1)
        self._size += self._log_path.shape[1]
        self._children = children

    def build(self) -> DraftTree:
        """All nodes that were drawn, level by level, siblings in the order of the draws."""
        batch, _, vocab = self._expanded[0][1].shape
        draft_probs = self._expanded[0][1].new_zeros(batch, self._size, vocab)
        for nodes, probs in self._expanded:
            draft_probs.scatter_(1, nodes[..., None].expand_as(probs), probs)
        return DraftTree(
            torch.cat(self._tokens, dim=1),
            torch.cat(self._parents, dim=1),
            torch.cat(self._depths, dim=1),
            draft_probs,
            levels=len(self._expanded),
        )
