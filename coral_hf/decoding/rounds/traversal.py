"""Traversal Verification on tensors: the rule of `acceptance_rules.traversal` for a whole batch.

In: a tree, the target's distribution after each node, uniforms. Out: a `Verdict`. The rule tries
whole paths, the deepest first, and what it tries next is the same whatever was drawn: all before it
was rejected. So how likely each node is accepted follows level by level from the root, and the
first node in the order of trying whose own draw accepts it ends the path.

    tree       0 ─┬─ 1 ─┬─ 3        siblings in order
                  │     └─ 4
                  └─ 2 ─── 5
    tried      3  4  1  5  2  0     a node after all that hang on it; the root is accepted at last
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..acceptance_rules import Chance, Uniforms
from ..drafting import PADDING, DraftTree
from ..verifier import Verdict, first_true, follow


class Chances(NamedTuple):
    """How likely each node is accepted once all before it were rejected, and what is left then."""

    accept: Tensor  # (batch, nodes)
    # by level of the tree: nodes that have children (batch, families), and what the target has yet
    # to say after them, (batch, families, vocab)
    left: list[tuple[Tensor, Tensor]]


def verify_traversal(tree: DraftTree, probs: Tensor, chance: Chance | Uniforms) -> Verdict:
    """Accept the first path whose end its own draw accepts, in a tree that was drawn.

    `probs`: (batch, nodes, vocab). For tokens that were chosen the rule is `verify_token`.
    """
    batch = len(tree.tokens)
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


def chances_of(tree: DraftTree, probs: Tensor) -> Chances:
    """Chances in a tree that was drawn as its `plan` says; `probs` are (batch, nodes, vocab)."""
    batch, nodes = tree.tokens.shape
    reach = torch.ones(batch, nodes, dtype=torch.float64, device=probs.device)
    accept, left, start = reach.clone(), [], 1
    assert tree.draft_probs is not None
    for families, children in tree.plan:
        stop = start + families * children
        tokens, parents = (
            part[:, start:stop].unflatten(1, (families, children))
            for part in (tree.tokens, tree.parents)
        )
        # (batch, families): a family without its first child has none
        parent = parents[..., 0].clamp(min=0)
        index = parent[..., None].expand(-1, -1, probs.shape[2])
        p, q = (part.gather(1, index).double() for part in (probs, tree.draft_probs))
        mine = reach.gather(1, parent)
        for child in range(children):
            token = tokens[..., child : child + 1]
            is_node = parents[..., child] != PADDING
            entered, rejected = _try(mine, p, q, token)
            for part in (reach, accept):
                part[:, start + child : stop : children] = entered
            mine = torch.where(is_node, rejected[0], mine)
            p = torch.where(is_node[..., None], rejected[1], p)
            if tree.draws != "independent":
                q = torch.where(is_node[..., None], _without(q, token), q)
        accept.scatter_(1, parent, mine)
        left.append((parent.masked_fill(parents[..., 0] == PADDING, PADDING), p))
        start = stop
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


def _without(q: Tensor, token: Tensor) -> Tensor:
    """`q` (batch, families, vocab) without a token (batch, families, 1), normed; zeros if empty."""
    rest = q.scatter(2, token, 0)
    return rest / rest.sum(2, keepdim=True).clamp(min=torch.finfo(rest.dtype).tiny)
