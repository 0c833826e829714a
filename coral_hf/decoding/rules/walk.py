"""Rules that walk down a draft tree from its root: the greedy one and the token rule, over tensors.

In: a `DraftTree` and the target's output of each node. Out: a `Verdict`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..chance import Chance, Uniforms
from ..drafting import PADDING, DraftTree


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


def verify_token(
    tree: DraftTree, target_probs: Callable[[Tensor], Tensor], chance: Chance | Uniforms
) -> Verdict:
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


def token_step(siblings: Siblings, target_probs: Tensor, chance: Chance | Uniforms) -> Step:
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
        p = torch.where(is_rejected, normed((p - q).clamp(min=0), token, p), p)
        if not siblings.is_independent:
            q = torch.where(is_rejected, normed(q, token, torch.zeros_like(q)), q)
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


def normed(probs: Tensor, token: Tensor, otherwise: Tensor) -> Tensor:
    """`probs` (..., vocab) without `token` (..., 1), normed; else `otherwise`."""
    rest = probs.scatter(-1, token, 0)
    mass = rest.sum(-1, keepdim=True)
    tiny = torch.finfo(rest.dtype).tiny  # whose inverse would overflow
    return torch.where(mass < tiny, otherwise, rest / mass.clamp(min=tiny))
