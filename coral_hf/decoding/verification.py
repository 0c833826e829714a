"""Verification of a draft tree by the target.

In: a `DraftTree` and a rule that draws the target's token after a node. Out: a `Verdict`, the
accepted path and one more token. Greedy: the argmax. Sampling from a deterministic tree: the
children of a node are tried in order, each accepted with probability p / q with q = 1, on
rejection p ← norm(p without the child) (EAGLE-2's rule; SpecInfer, Miao et al. 2024, with one-hot
q). Both rules give a token of the target's own distribution, and the walk goes on while that token
is a node of the tree; so the tree decides how far a round gets and never what comes out.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .tree import DraftTree


class Verdict(NamedTuple):
    """What the target makes of one row of a tree."""

    path: list[int]  # accepted nodes, the root first
    tokens: list[int]  # the accepted drafted tokens and the target's next one, len(path) in all


class Siblings(NamedTuple):
    """How the children of a node share the target's distribution after it."""

    chances: Tensor  # (children,), of accepting each child when those before it were rejected
    residual: Tensor  # (vocab,), the distribution left when all were rejected


# (node, tokens after the root up to the node, tokens of its children) → the target's next token
TokenRule = Callable[[int, list[int], list[int]], int]


def verify(tree: DraftTree, row: int, next_token: TokenRule) -> Verdict:
    """Walk down one row of a tree while the target's own next token is a child of the node.

    Args:
        tree: of any shape.
        row: which row of its batch.
        next_token: called once for each emitted token, in order.
    """
    children, token_of = tree.children(row), tree.tokens[row].tolist()
    path: list[int] = [0]
    tokens: list[int] = []
    while True:
        child_of = {token_of[child]: child for child in children[path[-1]]}
        token = next_token(path[-1], tokens, list(child_of))
        tokens = [*tokens, token]
        if token not in child_of:
            return Verdict(path, tokens)
        path.append(child_of[token])


def share_among_siblings(target_probs: Tensor, child_tokens: Tensor) -> Siblings:
    """Chance of each child under recursive rejection with q = 1, and the residual.

    The i-th child is accepted with p(xᵢ) after the earlier ones were taken out of p and p was
    normalised: p(xᵢ) / (1 - Σ_{j<i} p(xⱼ)).

    Args:
        target_probs: (vocab,), p.
        child_tokens: (children,), distinct, in the order in which they are tried.
    """
    p = target_probs[child_tokens]
    left = (1 - (p.cumsum(0) - p)).clamp(min=0)
    chances = torch.where(left > 0, p / left, torch.zeros_like(p)).clamp(max=1)
    residual = target_probs.index_fill(0, child_tokens, 0)
    total = residual.sum()
    return Siblings(chances, residual / total if total > 0 else target_probs)


def draw_token(
    target_probs: Tensor, child_tokens: list[int], generator: torch.Generator | None = None
) -> int:
    """Draw a token of `target_probs` (vocab,), trying the children first.

    Each with its chance of `share_among_siblings`; one of the residual if all are rejected.
    """
    siblings = share_among_siblings(
        target_probs, torch.tensor(child_tokens, device=target_probs.device).long()
    )
    luck = torch.rand(
        siblings.chances.shape,
        generator=generator,
        device=target_probs.device,
        dtype=siblings.chances.dtype,
    )
    accepted = (luck < siblings.chances).nonzero()
    if len(accepted):
        return child_tokens[int(accepted[0])]
    return int(torch.multinomial(siblings.residual, 1, generator=generator))
