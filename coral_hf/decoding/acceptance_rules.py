"""Acceptance rules over lists, one tree at a time: the output stays distributed as the target's.

In: a tree, the target's and the drafter's distribution after each node, and chance. Out: an
`Outcome`, the accepted path and what the next token is to be drawn from. `traversal` and `block`
run as they are; `greedy_walk` and `token_walk` are the plain form of `verify_greedy` and
`verify_token` in verifier.py, which run over a whole batch and are tested against them.

    greedy_walk  the path that the target's own choices take
    token_walk   token by token from the root: recursive rejection (SpecInfer, Miao et al. 2024);
                 with chosen tokens the rule of EAGLE-2 (Li et al. 2024)
    traversal    path by path from the leaves: Traversal Verification (Weng et al. 2025, arXiv
                 2505.12398)
    block        the same for chains: Block Verification (Sun et al. 2025, ICLR)

A tree is two lists, the token and the parent of each node. Node 0 is the root and its own parent,
parents come before their children, siblings are in the order in which they were drawn, and a node
of parent -1 is padding. Tokens were drawn from `draft_probs`, without replacement among siblings
unless `with_replacement` is set, or were chosen, when `draft_probs` is None: then q = 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# True with the given probability: a draw in production, every branch in turn in the tests
Accept = Callable[[float], bool]


class Chance:
    """Where the draws of a verification come from; tests put every possible answer in its place."""

    def accept(self, chances: Tensor) -> Tensor:
        """Whether to accept, with the given probabilities: (batch,) → (batch,), bool."""
        return torch.rand(chances.shape, device=chances.device) < chances

    def draw(self, probs: Tensor) -> Tensor:
        """A token of each distribution: (batch, vocab) → (batch,)."""
        return torch.multinomial(probs, 1)[:, 0]

    def is_accepted(self, chance: float) -> bool:
        """The `Accept` of the rules over lists."""
        return float(torch.rand(())) < chance


class Choice(NamedTuple):
    """Which of the siblings the target accepts."""

    child: int | None  # its place among the siblings; None: none was accepted
    probs: Tensor  # (vocab,), the residual if none was accepted, else the target's as given


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

        A token of no draft probability comes only when all others were drawn: it was chosen.
        """
        if self.draft is None:
            return min(1.0, self.reach * float(self.target[token]))
        p, q = torch.stack([self.target[token], self.draft[token]]).tolist()
        return min(1.0, self.reach * p / (q or 1.0))

    def reject(self, token: int, with_replacement: bool = False) -> "Remainder":
        """Take a rejected child out (Traversal Verification, appendix F).

        p ← [reach · p - q]₊ / S with S = Σ [reach · p - q]₊, reach ← S / (S + 1 - reach), and
        q ← norm(q without the token), or q as it is when siblings are drawn independently.
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


def greedy_walk(tokens: list[int], parents: list[int], best: list[int]) -> list[int]:
    """The longest path of which each token is the target's own choice.

    Args:
        tokens: of each node.
        parents: of each node.
        best: the target's choice after each node.
    """
    children = _children(parents)
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
    children = _children(parents)
    path = [0]
    while True:
        node = path[-1]
        siblings = [tokens[child] for child in children[node]]
        draft = None if draft_probs is None else draft_probs[node]
        choice = token_choice(target_probs[node], siblings, accept, draft, with_replacement)
        if choice.child is None:
            return Outcome(path, choice.probs)
        path.append(children[node][choice.child])


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
    children = _children(parents)

    def visit(node: int, reach: float) -> Outcome | None:
        """The path from this node on, if it or one below it is accepted."""
        if reach == 0:
            return None
        left = _remainder(node, reach, target_probs, draft_probs)
        for child in children[node]:
            below = visit(child, left.chance(tokens[child]))
            if below is not None:
                return Outcome([node, *below.path], below.probs)
            left = left.reject(tokens[child], with_replacement)
        return Outcome([node], left.target) if node == 0 or accept(left.reach) else None

    outcome = visit(0, 1.0)
    assert outcome is not None, "the root is always accepted"
    return outcome


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
    chain = _chain(parents)
    prefixes = [_remainder(0, 1.0, target_probs, draft_probs)]
    for child in chain[1:]:
        reach = prefixes[-1].chance(tokens[child])
        prefixes.append(_remainder(child, reach, target_probs, draft_probs))
    for place in range(len(chain) - 1, 0, -1):
        if accept(prefixes[place].reach):
            return Outcome(chain[: place + 1], prefixes[place].target)
        prefixes[place - 1] = prefixes[place - 1].reject(tokens[chain[place]])
    return Outcome([0], prefixes[0].target)


def _remainder(
    node: int, reach: float, target_probs: Tensor, draft_probs: Tensor | None
) -> Remainder:
    """A node with its own rows of `target_probs` and `draft_probs` (nodes, vocab)."""
    return Remainder(reach, target_probs[node], None if draft_probs is None else draft_probs[node])


def _without(probs: Tensor | None, token: int) -> Tensor | None:
    """`probs` (vocab,) without a token and normalised; all zero if there was no other."""
    if probs is None:
        return None
    rest = probs.clone()
    rest[token] = 0
    # the divisor stays on the device, so nothing waits for it
    return rest.div_(rest.sum().clamp_(min=torch.finfo(rest.dtype).tiny))


def _children(parents: list[int]) -> list[list[int]]:
    """The children of each node in order, padding left out."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        if parent >= 0:
            children[parent].append(node)
    return children


def _chain(parents: list[int]) -> list[int]:
    """The nodes of a chain, the root first."""
    children = _children(parents)
    chain = [0]
    while siblings := children[chain[-1]]:
        if len(siblings) > 1:
            raise ValueError(
                f"`parents` is {parents}, where node {chain[-1]} has {len(siblings)} children; "
                "`block` takes chains, use `traversal` for other trees."
            )
        chain.append(siblings[0])
    return chain
