"""The draft tree: its nodes, its mask, its paths, and how it grows level by level.

In: for each level, the best children of the nodes that were expanded. Out: a `DraftTree`. EAGLE-2
(Li et al. 2024, sections 4.1 and 4.2): the most confident nodes of a level are expanded, the most
confident nodes of all are verified.

    node       0           1        2        3        4        the root is the last certain token
    token      "It"        "is"     "was"    "a"      "the"
    parent     -           0        0        1        1
    depth      0           1        1        2        2
    the root's children in order: 1, 2; node 1's: 3, 4; siblings do not see each other
"""

from typing import NamedTuple

import torch
from torch import Tensor

PADDING = -1  # the parent of a node that is none


class TreeShape(NamedTuple):
    """How large a tree may grow."""

    depth: int  # levels below the root
    top_k: int  # children of an expanded node, and nodes expanded in a level
    nodes: int  # rows of the target's pass, the root included
    node_floor: float = 0.0  # a node's confidence from which on it is worth a row
    level_floor: float = 0.0  # confidence of a beam, summed, from which on it is worth a level


class DraftTree(NamedTuple):
    """A tree of drafted tokens; parents come before their children, siblings best first."""

    tokens: Tensor  # (batch, nodes), the root is node 0
    parents: Tensor  # (batch, nodes), the root is its own parent; `PADDING` where there is no node
    depths: Tensor  # (batch, nodes)
    # (batch, nodes, vocab); None where tokens were chosen, not drawn
    draft_probs: Tensor | None = None  # q after each node, of the tokens that were drawn there
    levels: int = 0  # that were drafted, whether or not a node of theirs was kept

    def to(self, device: torch.device) -> "DraftTree":
        """The same tree on a device."""
        parts = self._asdict().items()
        return self._replace(**{n: p.to(device) for n, p in parts if isinstance(p, Tensor)})

    def ancestry(self) -> Tensor:
        """Whether the second node is on the path from the root to the first.

        (batch, nodes, nodes); a node is on its own path.
        """
        batch, nodes = self.tokens.shape
        seen = torch.eye(nodes, dtype=torch.bool, device=self.tokens.device).repeat(batch, 1, 1)
        parents = self.parents.clamp(min=0)
        ancestor = parents
        for _ in range(int(self.depths.max())):
            seen.scatter_(2, ancestor[..., None], True)
            ancestor = parents.gather(1, ancestor)
        return seen

    def children(self, row: int) -> list[list[int]]:
        """The children of each node of one row of the batch, best first."""
        parents = self.parents[row].tolist()
        children: list[list[int]] = [[] for _ in parents]
        for node, parent in enumerate(parents[1:], start=1):
            if parent != PADDING:
                children[parent].append(node)
        return children


def root_only(tokens: Tensor) -> DraftTree:
    """A tree of one node per row, which makes a round a plain decoding step: `tokens` (batch,)."""
    zeros = torch.zeros_like(tokens)[:, None]
    return DraftTree(tokens[:, None], zeros, zeros)


class Beam(NamedTuple):
    """The nodes of the newest level that are worth expanding."""

    tokens: Tensor  # (batch, beam)
    parents: Tensor  # (batch, beam), which node of the previous beam each one hangs on
    log_path: Tensor  # (batch, beam), log-confidence of the path from the root


class TreeBuilder:
    """Collects levels of children and keeps the best nodes of all.

    A child's confidence is at most its parent's, and ties go to the earlier node, so the nodes
    that are kept always form a tree.
    """

    def __init__(self, root: Tensor, shape: TreeShape):
        """Start at the root's token, (batch,)."""
        self._shape = shape
        self._root = root
        self._tokens: list[Tensor] = []  # each (batch, nodes of a level)
        self._log_paths: list[Tensor] = []
        self._parents: list[Tensor] = []  # pool indices, the root is -1
        self._size = 0
        # (batch, beam), pool indices of the newest beam
        self._beam_nodes = torch.full_like(root, -1)[:, None]
        self._beam_log_path = torch.zeros(root.shape[0], 1, device=root.device)

    def add_level(self, tokens: Tensor, log_confidence: Tensor) -> Beam:
        """Add the children of the newest beam, and choose the next beam among them.

        Both are (batch, beam, top_k).
        """
        # (batch, beam * top_k)
        log_paths = (self._beam_log_path[..., None] + log_confidence).flatten(1)
        tokens, top_k = tokens.flatten(1), tokens.shape[-1]
        self._tokens.append(tokens)
        self._log_paths.append(log_paths)
        self._parents.append(self._beam_nodes.repeat_interleave(top_k, dim=1))
        best, index = log_paths.topk(min(self._shape.top_k, log_paths.shape[1]), dim=1)
        self._beam_nodes, self._beam_log_path = self._size + index, best
        self._size += tokens.shape[1]
        return Beam(tokens.gather(1, index), index // top_k, best)

    def is_worth_more(self, beam: Beam) -> bool:
        """Whether to draft the level below a beam, on average over the batch.

        Each node of the beam that is accepted gives one more accepted node at most.
        """
        floor = self._shape.level_floor
        return floor == 0 or float(beam.log_path.exp().sum(1).mean()) >= floor

    def build(self) -> DraftTree:
        """The root and the best nodes of the pool, in the order in which they were added."""
        log_paths = torch.cat(self._log_paths, dim=1)  # (batch, pool)
        # stable: of equal nodes the earlier, so a parent is kept before its child
        ranked, order = log_paths.sort(dim=1, descending=True, stable=True)
        kept = min(self._shape.nodes - 1, self._num_worthy(ranked))
        chosen = order[:, :kept].sort(dim=1).values  # (batch, kept)
        parents = self._renumber(torch.cat(self._parents, dim=1).gather(1, chosen), chosen)
        tokens = torch.cat(self._tokens, dim=1).gather(1, chosen)
        root = torch.zeros_like(self._root)[:, None]
        depths = _depths(torch.cat([root, parents], dim=1), len(self._tokens))
        # a head that read few tokens has fewer children than were asked for
        is_node = log_paths.gather(1, chosen) > float("-inf")
        parents = torch.cat([root, parents.masked_fill(~is_node, PADDING)], dim=1)
        return DraftTree(
            torch.cat([self._root[:, None], tokens], dim=1),
            parents,
            depths,
            levels=len(self._tokens),
        )

    def _num_worthy(self, ranked: Tensor) -> int:
        """How many of a row's best nodes are worth a row of the target's pass.

        `ranked`: (batch, pool), log-confidence, best first. The pass is as wide as its widest row,
        so nodes of equal rank count together.
        """
        floor = self._shape.node_floor
        return ranked.shape[1] if floor == 0 else int((ranked.exp().mean(0) >= floor).sum())

    def _renumber(self, parents: Tensor, chosen: Tensor) -> Tensor:
        """Pool indices of parents (batch, kept) → node ids, the root's -1 becoming 0."""
        node_of = chosen.new_zeros(chosen.shape[0], self._size + 1)
        ids = torch.arange(1, chosen.shape[1] + 1, device=chosen.device).expand_as(chosen)
        node_of.scatter_(1, chosen + 1, ids)
        return node_of.gather(1, parents + 1)


def _depths(parents: Tensor, max_depth: int) -> Tensor:
    """How many steps each node (batch, nodes) is below the root."""
    depths = torch.zeros_like(parents)
    ancestor = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
    for _ in range(max_depth):
        depths = depths + (ancestor > 0)
        ancestor = parents.gather(1, ancestor)
    return depths
