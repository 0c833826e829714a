"""Traversal Verification of a draft tree (Weng et al. 2025, arXiv 2505.12398), over tensors.

In: a tree, the target's distribution after each node, chance. Out: a `Verdict`. The rule tries
whole paths, the deepest first, and what it tries next is the same whatever was drawn: all before it
was rejected. So how likely each node is accepted follows level by level from the root, and the
first node in the order of trying whose own draw accepts it ends the path. On a chain that is Block
Verification (Sun et al. 2025, ICLR).

    tree       0 ─┬─ 1 ─┬─ 3        siblings in order
                  │     └─ 4
                  └─ 2 ─── 5
    tried      3  4  1  5  2  0     a node after all that hang on it; the root is accepted at last
"""

from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ..chance import Chance, Uniforms
from ..drafting import PADDING, DraftTree, host_tensor
from .walk import Verdict, first_true, follow, normed


class Chances(NamedTuple):
    """How likely each node is accepted once all before it were rejected, and what is left then."""

    accept: Tensor  # (batch, nodes)
    # nodes that have children (batch, families), and what the target has yet to say after them,
    # (batch, families, vocab)
    left: list[tuple[Tensor, Tensor]]


def verify_traversal(tree: DraftTree, probs: Tensor, chance: Chance | Uniforms) -> Verdict:
    """Accept the first path whose end its own draw accepts, in a tree that was drawn.

    `probs`: (batch, nodes, vocab). For tokens that were chosen the rule is `verify_token`.
    """
    batch = len(tree.tokens)
    if not tree.plan and batch > 1:  # families differ from row to row
        tree, rows = tree._replace(levels=tree.max_depth), []
        for row, own in enumerate(probs.split(1)):
            alone = tree.each(itemgetter(slice(row, row + 1)))
            rows.append(verify_traversal(alone, own, chance))
        return Verdict(*map(torch.cat, zip(*rows, strict=True)))
    chances = chances_of(tree, probs)
    drawn = torch.stack([chance.accept(accept) for accept in chances.accept.T], dim=1)
    is_accepted = drawn & (tree.parents != PADDING)
    is_accepted[:, 0].fill_(True)
    # a node leads on where one below it, or itself, is accepted
    leads_on = (tree.ancestry() & is_accepted[..., None]).any(1)
    leads_on[:, 0].fill_(False)
    path, lengths = follow(tree, leads_on)
    last = path.gather(1, lengths[:, None] - 1)  # (batch, 1)
    rows = torch.arange(batch, device=last.device)
    rest = probs[rows, last[:, 0]].double()  # (batch, vocab), of a leaf
    for families, left in chances.left:
        is_last = families == last  # (batch, families)
        place = first_true(is_last)
        rest = torch.where(is_last.any(1, keepdim=True), left[rows, place], rest)
    return Verdict(path, lengths, chance.draw(rest))


def families_of(tree: DraftTree) -> list[Tensor]:
    """List nodes (families, children), siblings side by side, none before those it hangs on.

    By its `plan`; without one, of a single row (1, nodes), family by family.
    """
    found, start, device = [], 1, tree.tokens.device
    for families, children in tree.plan:
        stop = start + families * children
        found.append(torch.arange(start, stop, device=device).view(families, children))
        start = stop
    parents = [] if tree.plan else tree.parents[0, 1:].tolist()
    for parent in sorted({*parents} - {PADDING}):
        family = [node for node, own in enumerate(parents, start=1) if own == parent]
        found.append(host_tensor([family]).to(device))
    return found


def chances_of(tree: DraftTree, probs: Tensor) -> Chances:
    """Chances in a tree that was drawn; `probs` are (batch, nodes, vocab)."""
    reach = torch.ones(tree.tokens.shape, dtype=torch.float64, device=probs.device)
    accept, left = reach.clone(), []
    assert tree.draft_probs is not None
    for nodes in families_of(tree):
        # (batch, families, children)
        tokens, parents = tree.tokens[:, nodes], tree.parents[:, nodes]
        # (batch, families): a family without its first child has none
        parent = parents[..., 0].clamp(min=0)
        index = parent[..., None].expand(-1, -1, probs.shape[2])
        p, q = (part.gather(1, index).double() for part in (probs, tree.draft_probs))
        mine = reach.gather(1, parent)
        for child in range(nodes.shape[1]):
            token = tokens[..., child : child + 1]
            is_node = parents[..., child] != PADDING
            entered, rejected = _try(mine, p, q, token)
            for part in (reach, accept):
                part[:, nodes[:, child]] = entered
            mine = torch.where(is_node, rejected[0], mine)
            p = torch.where(is_node[..., None], rejected[1], p)
            if tree.draws != "independent":
                q = torch.where(is_node[..., None], normed(q, token, torch.zeros_like(q)), q)
        accept.scatter_(1, parent, mine)
        left.append((parent.masked_fill(parents[..., 0] == PADDING, PADDING), p))
    return Chances(accept, left)


def _try(
    reach: Tensor, p: Tensor, q: Tensor, token: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What a child is reached with, and what of its parent is left when it was rejected.

    Args:
        reach: (batch, families), of the parents.
        p, q: (batch, families, vocab), what the target has yet to say, and what was drawn from.
        token: (batch, families, 1), of the child.
    """
    own_p, own_q = p.gather(2, token)[..., 0], q.gather(2, token)[..., 0]
    # a token of no draft probability comes only when all others were drawn: it was chosen
    entered = (reach * own_p / torch.where(own_q == 0, 1, own_q)).clamp(max=1)
    rest = (reach[..., None] * p - q).clamp(min=0).scatter(2, token, 0)
    mass = rest.sum(2)
    tiny = torch.finfo(rest.dtype).tiny  # whose inverse would overflow
    mass = torch.where(mass < tiny, 0, mass)
    beside = mass + (1 - reach)
    left = torch.where(beside > 0, mass / beside.clamp(min=tiny), reach)
    p = torch.where(mass[..., None] > 0, rest / mass.clamp(min=tiny)[..., None], p)
    is_open = reach > 0  # else nothing below can be accepted any more
    return entered, (torch.where(is_open, left, reach), p)
