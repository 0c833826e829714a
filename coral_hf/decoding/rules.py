"""Acceptance rules over tensors: which path of a tree the target accepts, and the next token.

In: a `DraftTree`, the target's output of each node, chance. Out: a `Verdict`. The greedy rule and
the token rule walk down from the root. Traversal Verification (Weng et al. 2025, arXiv 2505.12398)
tries whole paths, the deepest first, and what it tries next is the same whatever was drawn: all
before it was rejected. So how likely each node is accepted follows level by level from the root,
and the first node in the order of trying whose own draw accepts it ends the path. On a chain that
is Block Verification (Sun et al. 2025, ICLR).

    tree       0 ─┬─ 1 ─┬─ 3        siblings in order
                  │     └─ 4
                  └─ 2 ─── 5
    tried      3  4  1  5  2  0     a node after all that hang on it; the root is accepted at last
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .chance import Draws
from .drafting import PADDING, DraftTree, host_tensor


class Verdict(NamedTuple):
    """What the target accepts of a tree: a path, and one more token."""

    path: Tensor  # (batch, depth + 1), nodes from the root on; 0 behind `lengths`
    lengths: Tensor  # (batch,), nodes on the path, which is also how many tokens come out
    next_token: Tensor  # (batch,), the target's own, after the last node

    def tokens(self, tree: DraftTree) -> Tensor:
        """The tokens that come out: (batch, depth + 1), anything behind `lengths`."""
        drafted = tree.tokens.gather(1, self.path.roll(-1, dims=1))
        last = self.next_token[:, None].to(drafted.dtype)  # ids may be of any integer type
        return drafted.scatter(1, self.lengths[:, None] - 1, last)


class Siblings(NamedTuple):
    """The children of one node of each row, and how they came about."""

    tokens: Tensor  # (batch, nodes), of all nodes
    is_child: Tensor  # (batch, nodes)
    draft_probs: Tensor | None = None  # (batch, vocab), q that they were drawn from; None if chosen
    is_independent: bool = False  # whether they were drawn with replacement
    most: int = 0  # children of a node; 0: not known

    def with_token(self, token: Tensor) -> Tensor:
        """Find the first child that has a `token`, 0 if none has; both have shape (batch,)."""
        return first_true(self.is_child & (self.tokens == token[:, None]))


class Step(NamedTuple):
    """One token of the target's distribution, and the node of the tree that has it."""

    token: Tensor  # (batch,)
    child: Tensor  # (batch,), 0 where the walk leaves the tree


def verify_greedy(tree: DraftTree, logits: Tensor) -> Verdict:
    """Follow the target's most probable tokens; `logits` are (batch, nodes, vocab)."""
    best = logits.argmax(-1)  # (batch, nodes)
    agrees = (tree.tokens == best.gather(1, tree.parents.clamp(min=0))) & (tree.parents != PADDING)
    agrees[:, 0].fill_(False)  # an assignment would copy a number to the device
    path, lengths = follow(tree, agrees)
    last = path.gather(1, lengths[:, None] - 1)
    return Verdict(path, lengths, best.gather(1, last)[:, 0])


def follow(tree: DraftTree, leads_on: Tensor) -> tuple[Tensor, Tensor]:
    """Go down from the root, always to the first child that leads on.

    Args:
        leads_on: (batch, nodes), never True of the root.

    Returns:
        the path and its length, as in a [`Verdict`].
    """
    batch, nodes = leads_on.shape
    # the first such child of each node; `nodes` stands for none, and is its own child
    ids = torch.arange(nodes, device=leads_on.device).expand(batch, -1)
    child = ids.new_full((batch, nodes + 1), nodes)
    child.scatter_reduce_(1, tree.parents.clamp(min=0), ids.masked_fill(~leads_on, nodes), "amin")
    steps = [torch.zeros(batch, 1, dtype=torch.long, device=leads_on.device)]
    for _ in range(tree.max_depth):
        steps.append(child.gather(1, steps[-1]))
    path = torch.cat(steps, dim=1)  # (batch, depth + 1)
    is_node = path < nodes
    return path.masked_fill(~is_node, 0), is_node.sum(1)


def verify_token(tree: DraftTree, target_probs: Callable[..., Tensor], chance: Draws) -> Verdict:
    """Walk down from the root, token by token, in all rows at once.

    Args:
        target_probs: nodes (batch,) → p after them, (batch, vocab): computed only where a walk
            arrives, since warpers such as top-p sort the vocabulary.
    """
    batch, device = len(tree.tokens), tree.tokens.device
    node = torch.zeros(batch, dtype=torch.long, device=device)
    is_walking = torch.ones_like(node, dtype=torch.bool)
    lengths, next_token, path = torch.zeros_like(node), torch.zeros_like(node), []
    for _ in range(tree.max_depth + 1):
        step = token_step(siblings_at(tree, node), target_probs(node), chance)
        path.append(node)
        lengths = lengths + is_walking
        next_token = torch.where(is_walking, step.token, next_token)
        is_walking = is_walking & (step.child > 0)
        node = torch.where(is_walking, step.child, 0)
        if chance.may_look(device) and not is_walking.any():
            break
    return Verdict(torch.stack(path, dim=1), lengths, next_token)


def siblings_at(tree: DraftTree, node: Tensor, rows: Sequence[int] | None = None) -> Siblings:
    """List the children of each row's `node`, of shape (batch,); of all rows or of `rows`."""
    tokens, is_child, draft = tree.tokens, tree.children_of(node), None
    if tree.draft_probs is not None:
        draft = tree.draft_probs[torch.arange(len(node), device=node.device), node]
    if rows is not None:
        tokens, is_child = tokens[list(rows)], is_child[list(rows)]
        draft = None if draft is None else draft[list(rows)]
    return Siblings(tokens, is_child, draft, tree.draws == "independent", tree.branching)


def token_step(siblings: Siblings, target_probs: Tensor, chance: Draws) -> Step:
    """A token of `target_probs` (batch, vocab), as often as possible one of the siblings'.

    Chosen siblings (q = 1) are accepted with p in all, so the target's own draw decides. Drawn ones
    are tried in turn, each accepted with min(1, p / q) (SpecInfer, Miao et al. 2024): on a
    rejection p ← norm([p - q]₊) and q ← norm(q without the child) (Traversal Verification,
    algorithm 2), or q as it is if they are independent.
    """
    tokens, is_child = siblings.tokens, siblings.is_child
    if siblings.draft_probs is None:
        token = chance.draw(target_probs)
        return Step(token, siblings.with_token(token))
    p, q = target_probs, siblings.draft_probs
    child = torch.zeros_like(tokens[:, 0])
    may_look = chance.may_look(tokens.device)
    for _ in range(siblings.most or int(is_child.sum(1).max())):
        tried = first_true(is_child)  # (batch,)
        is_tried = (tried > 0) & (child == 0)
        if may_look and not is_tried.any():
            break
        token = tokens.gather(1, tried[:, None])  # (batch, 1)
        own_q = q.gather(1, token)
        # a token of no draft probability comes only when all others were drawn: it was chosen
        chances = p.gather(1, token) / own_q.masked_fill(own_q == 0, 1)
        is_accepted = chance.accept(chances[:, 0].clamp(max=1)) & is_tried
        child = torch.where(is_accepted, tried, child)
        is_rejected = (is_tried & ~is_accepted)[:, None]
        p = torch.where(is_rejected, _normed((p - q).clamp(min=0), token, p), p)
        if not siblings.is_independent:
            q = torch.where(is_rejected, _normed(q, token, torch.zeros_like(q)), q)
        is_child = is_child.scatter(1, tried[:, None], False)
    drawn = chance.draw(p)
    return Step(torch.where(child > 0, tokens.gather(1, child[:, None])[:, 0], drawn), child)


def first_true(mask: Tensor) -> Tensor:
    """Find the first True of each row of a mask (batch, nodes), 0 if there is none: (batch,).

    Not by `argmax` of integers: what Inductor makes of it on a CPU reads lanes that nobody wrote
    where all are equal, and gives any number (torch 2.13).
    """
    nodes = mask.shape[1]
    ids = torch.arange(nodes, device=mask.device)
    first = torch.where(mask, ids, nodes).amin(1)
    return torch.where(first < nodes, first, 0)


class Chances(NamedTuple):
    """How likely each node is accepted once all before it were rejected, and what is left then."""

    accept: Tensor  # (batch, nodes)
    # nodes that have children (batch, families), and what the target has yet to say after them,
    # (batch, families, vocab)
    left: list[tuple[Tensor, Tensor]]


def verify_traversal(tree: DraftTree, probs: Tensor, chance: Draws) -> Verdict:
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
            entered, left_reach, left_p = _try(mine, p, q, token)
            for part in (reach, accept):
                part[:, nodes[:, child]] = entered
            mine = torch.where(is_node, left_reach, mine)
            p = torch.where(is_node[..., None], left_p, p)
            if tree.draws != "independent":
                q = torch.where(is_node[..., None], _normed(q, token, torch.zeros_like(q)), q)
        accept.scatter_(1, parent, mine)
        left.append((parent.masked_fill(parents[..., 0] == PADDING, PADDING), p))
    return Chances(accept, left)


def _try(reach: Tensor, p: Tensor, q: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a child is reached with, and what of its parent is left when it was rejected: reach, p.

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
    return entered, torch.where(is_open, left, reach), p


def _normed(probs: Tensor, token: Tensor, otherwise: Tensor) -> Tensor:
    """`probs` (..., vocab) without `token` (..., 1), normed; else `otherwise`."""
    rest = probs.scatter(-1, token, 0)
    mass = rest.sum(-1, keepdim=True)
    tiny = torch.finfo(rest.dtype).tiny  # whose inverse would overflow
    return torch.where(mass < tiny, otherwise, rest / mass.clamp(min=tiny))
