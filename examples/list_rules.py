"""Traversal Verification in its plain form, over lists and one tree at a time.

In: a tree, the target's and the drafter's distribution after each node, and chance. Out: an
`Outcome`, the accepted path and what the next token is to be drawn from (Weng et al. 2025, arXiv
2505.12398). The package runs the same rule over tensors, `coral_hf.decoding.rules`, which tests
hold to this one.

A tree is two lists, the token and the parent of each node. Node 0 is the root and its own parent,
parents come before their children, siblings are in the order in which they were drawn, and a node
of parent -1 is padding. Tokens were drawn from `draft_probs`, without replacement among siblings
unless `with_replacement` is set, or were chosen, when `draft_probs` is None: then q = 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# True with the given probability: a draw, or in the tests every branch in turn
Accept = Callable[[float], bool]


class Outcome(NamedTuple):
    """What the target accepts of a tree."""

    path: list[int]  # accepted nodes, the root first
    probs: Tensor  # (vocab,), what the token after the path is to be drawn from


class Remainder(NamedTuple):
    """What is left after a node when some of its children were rejected."""

    reach: float  # p of the paper, how likely the node is accepted if no child of it is
    target: Tensor  # (vocab,), M_b of the paper, what the target has yet to say after the node
    draft: Tensor | None  # (vocab,), M_s, what the next child was drawn from; None: was chosen

    def chance(self, token: int) -> float:
        """Chance of the next child, min(1, reach · p / q) (Traversal Verification, section 3).

        p and q are read from distributions of shape (vocab,).

        A token of no draft probability comes only when all others were drawn: it was chosen.
        """
        if self.draft is None:
            return min(1.0, self.reach * float(self.target[token]))
        p, q = torch.stack([self.target[token], self.draft[token]]).tolist()
        return min(1.0, self.reach * p / (q or 1.0))

    def reject(self, token: int, with_replacement: bool = False) -> "Remainder":
        """Take a rejected child out (Traversal Verification, appendix F).

        p ← [reach · p - q]₊ / S with S = Σ [reach · p - q]₊, reach ← S / (S + 1 - reach), and
        q ← norm(q without the token), or q as it is when siblings are drawn independently; both
        distributions have shape (vocab,).
        """
        if self.reach == 0:  # nothing below the node can be accepted any more
            return self
        residual = self.reach * self.target  # (vocab,)
        if self.draft is not None:
            residual = residual.sub_(self.draft).clamp_(min=0)
        residual[token] = 0  # also where q = 1; where it was drawn, p < q or it had been accepted
        mass = float(residual.sum())
        if mass < torch.finfo(residual.dtype).tiny:  # whose inverse would overflow
            mass = 0.0
        beside = mass + (1 - self.reach)
        return Remainder(
            reach=mass / beside if beside > 0 else self.reach,
            target=residual.div_(mass) if mass > 0 else self.target,
            draft=self.draft if with_replacement else _without(self.draft, token),
        )


def traversal(
    tokens: list[int],
    parents: list[int],
    target_probs: Tensor,
    draft_probs: Tensor | None,
    accept: Accept,
    with_replacement: bool = False,
) -> Outcome:
    """Try whole paths, the deepest first (Traversal Verification, section 3 and appendix E).

    A node is tried when all its children were rejected. The root is accepted at last.

    Args:
        tokens: of each node.
        parents: of each node.
        target_probs: (nodes, vocab), p after each node.
        draft_probs: (nodes, vocab), q after each node; None: tokens were chosen.
        accept: called for each node that is tried.
        with_replacement: whether siblings were drawn independently, so that tokens may repeat.
    """
    children = list_children(parents)

    def visit(node: int, reach: float) -> Outcome | None:
        """The path from this node on, if it or one below it is accepted."""
        if reach == 0:
            return None
        draft = None if draft_probs is None else draft_probs[node]
        left = Remainder(reach, target_probs[node], draft)
        for child in children[node]:
            below = visit(child, left.chance(tokens[child]))
            if below is not None:
                return Outcome([node, *below.path], below.probs)
            left = left.reject(tokens[child], with_replacement)
        return Outcome([node], left.target) if node == 0 or accept(left.reach) else None

    outcome = visit(0, 1.0)
    assert outcome is not None, "the root is always accepted"
    return outcome


def _without(probs: Tensor | None, token: int) -> Tensor | None:
    """Return `probs`, of shape (vocab,), without a token, normalised; zeros if no other is left."""
    if probs is None:
        return None
    rest = probs.clone()
    rest[token] = 0
    # the divisor stays on the device, so nothing waits for it
    return rest.div_(rest.sum().clamp_(min=torch.finfo(rest.dtype).tiny))


def list_children(parents: list[int]) -> list[list[int]]:
    """The children of each node in order, padding left out."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        if parent >= 0:
            children[parent].append(node)
    return children
