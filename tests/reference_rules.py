"""Plain forms of the acceptance rules, over lists: what the shipped rules are held to.

    greedy_walk  the path that the target's own choices take
    token_walk   token by token from the root: recursive rejection (SpecInfer, Miao et al. 2024);
                 with chosen tokens the rule of EAGLE-2 (Li et al. 2024)
    block        Block Verification of a chain (Sun et al. 2025, ICLR), which traversal is there

Trees and traversal are those of `examples/list_rules.py`.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from list_rules import Accept, Outcome, Remainder, list_children, traversal  # noqa: E402

__all__ = ["Accept", "Outcome", "Remainder", "list_children", "traversal"]


class Choice(NamedTuple):
    """Which of the siblings the target accepts."""

    child: int | None  # its place among the siblings; None: none was accepted
    probs: Tensor  # (vocab,), the residual if none was accepted, else the target's as given


def greedy_walk(tokens: list[int], parents: list[int], best: list[int]) -> list[int]:
    """The longest path of which each token is the target's own choice.

    Args:
        tokens: of each node.
        parents: of each node.
        best: the target's choice after each node.
    """
    children = list_children(parents)
    path = [0]
    while True:
        agreeing = [child for child in children[path[-1]] if tokens[child] == best[path[-1]]]
        if not agreeing:
            return path
        path.append(agreeing[0])


def token_choice(
    target_probs: Tensor,
    child_tokens: list[int],
    accept: Accept,
    draft_probs: Tensor | None = None,
    with_replacement: bool = False,
) -> Choice:
    """Try siblings in turn, each accepted with min(1, p / q) (SpecInfer, Miao et al. 2024).

    On a rejection p ← norm([p - q]₊) and q ← norm(q without the child) (Traversal Verification,
    algorithm 2).

    Args:
        target_probs: (vocab,), p.
        child_tokens: in the order in which they were drawn.
        accept: called for each child that is tried.
        draft_probs: (vocab,), q, what the first child was drawn from; None: tokens were chosen.
        with_replacement: whether siblings were drawn independently, so that tokens may repeat.
    """
    left = Remainder(1.0, target_probs, draft_probs)
    for child, token in enumerate(child_tokens):
        if accept(left.chance(token)):
            return Choice(child, target_probs)
        left = left.reject(token, with_replacement)
    return Choice(None, left.target)


def token_walk(
    tokens: list[int],
    parents: list[int],
    target_probs: Tensor,
    draft_probs: Tensor | None,
    accept: Accept,
    with_replacement: bool = False,
) -> Outcome:
    """Walk down from the root while a child is accepted by `token_choice`.

    Args:
        tokens: of each node.
        parents: of each node.
        target_probs: (nodes, vocab), p after each node.
        draft_probs: (nodes, vocab), q after each node; None: tokens were chosen.
        accept: called for each node that is tried.
        with_replacement: whether siblings were drawn independently, so that tokens may repeat.
    """
    children = list_children(parents)
    path = [0]
    while True:
        node = path[-1]
        siblings = [tokens[child] for child in children[node]]
        draft = None if draft_probs is None else draft_probs[node]
        choice = token_choice(target_probs[node], siblings, accept, draft, with_replacement)
        if choice.child is None:
            return Outcome(path, choice.probs)
        path.append(children[node][choice.child])


def block(
    tokens: list[int],
    parents: list[int],
    target_probs: Tensor,
    draft_probs: Tensor | None,
    accept: Accept,
) -> Outcome:
    """Accept the longest prefix of a chain that a draw of its own allows (Sun et al. 2025).

    After i tokens reachᵢ = min(1, reachᵢ₋₁ · p / q), and the prefix is accepted with reach at the
    end of the chain and with Sᵢ / (Sᵢ + 1 - reachᵢ) before it, where Sᵢ = Σ [reachᵢ · p - q]₊; the
    next token is drawn from [reachᵢ · p - q]₊ / Sᵢ.

    Args:
        tokens: of each node.
        parents: of each node; of a chain.
        target_probs: (nodes, vocab), p after each node.
        draft_probs: (nodes, vocab), q after each node; None: tokens were chosen.
        accept: called for each prefix that is tried, the longest first.
    """
    chain = [node for node, parent in enumerate(parents) if parent >= 0]
    prefixes = [remainder_of(0, 1.0, target_probs, draft_probs)]
    for child in chain[1:]:
        reach = prefixes[-1].chance(tokens[child])
        prefixes.append(remainder_of(child, reach, target_probs, draft_probs))
    for place in range(len(chain) - 1, 0, -1):
        if accept(prefixes[place].reach):
            return Outcome(chain[: place + 1], prefixes[place].target)
        prefixes[place - 1] = prefixes[place - 1].reject(tokens[chain[place]])
    return Outcome([0], prefixes[0].target)


def remainder_of(
    node: int, reach: float, target_probs: Tensor, draft_probs: Tensor | None
) -> Remainder:
    """A node with its own rows of `target_probs` and `draft_probs` (nodes, vocab)."""
    return Remainder(reach, target_probs[node], None if draft_probs is None else draft_probs[node])
