"""Traversal Verification of a draft tree, which keeps the target's distribution exactly.

In: a tree, the target's and the drafter's distribution after each node, and chance. Out: an
`Outcome`, the accepted path and what the next token is to be drawn from (Weng et al. 2025, arXiv
2505.12398). On a chain the rule is Block Verification (Sun et al. 2025, ICLR). The greedy rule and
the token rule run over a whole batch, in verifier.py; tests hold them to plain forms over lists.

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
    """Where all draws come from, in float64; tests put every possible answer in its place.

    The one source is torch's generator of the CPU. Other devices have generators of their own, and
    all of them have one seed after `torch.manual_seed`: a drafter and a target on two devices would
    draw the same numbers. So each `Chance` seeds a generator there from the one source.
    """

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def may_look(self, device: torch.device) -> bool:
        """Whether a rule may look at values to end early: on a CPU that is free."""
        return device.type == "cpu"

    def accept(self, chances: Tensor) -> Tensor:
        """Accept with the given probabilities, of shape (batch,), independently of each other."""
        device = chances.device
        uniform = torch.rand(
            chances.shape, dtype=torch.float64, device=device, generator=self.of(device)
        )
        return uniform < chances

    def draw(self, probs: Tensor) -> Tensor:
        """A token of each distribution: (batch, vocab) → (batch,)."""
        probs = probs.double()
        mass = probs.cumsum(-1) if probs.device.type == "cpu" else None
        # elsewhere sums in order are not deterministic; what is no distribution raises
        if mass is None or not (mass[:, -1].isfinite() & (mass[:, -1] > 0)).all():
            return torch.multinomial(probs, 1, generator=self.of(probs.device))[:, 0]
        drawn = mass[:, -1:] * torch.rand(len(mass), 1, dtype=torch.float64, device="cpu")
        # the first token whose mass lies beyond, which is never one of probability 0
        return torch.searchsorted(mass, drawn, right=True)[:, 0].clamp(max=probs.shape[1] - 1)

    def race(self, probs: Tensor) -> Tensor:
        """Each p over an exponential draw of its own, of shape (..., vocab), positive where p is.

        In descending order they are draws without replacement (Kool et al. 2019, section 3, where
        they are log p plus Gumbel noise).
        """
        noise = torch.empty(probs.shape, dtype=torch.float64, device=probs.device)
        noise.exponential_(generator=self.of(probs.device))
        return probs / noise.clamp_(min=torch.finfo(noise.dtype).tiny)

    def draw_siblings(self, probs: Tensor, children: int) -> tuple[Tensor, Tensor]:
        """Draw tokens without replacement, in order.

        Returns:
            tokens (batch, families, children) of `probs` (batch, families, vocab), and which of
            them there are: a distribution of few tokens gives as many as it has.
        """
        order, tokens = self.race(probs).topk(children, dim=2)
        return tokens, order > 0

    def is_accepted(self, chance: float) -> bool:
        """Draw one answer: the `Accept` of the rules over lists, which reads no tensor."""
        return float(torch.rand((), dtype=torch.float64, device="cpu")) < chance

    def of(self, device: torch.device) -> torch.Generator | None:
        """The generator of a device, None for the source itself."""
        if device.type == "cpu":
            return None
        if device not in self._generators:
            seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
            self._generators[device] = torch.Generator(device).manual_seed(int(seed))
        return self._generators[device]


class Uniforms:
    """The same draws from numbers that are drawn before, so that no step waits for one.

    `numbers` are (count, batch), and `siblings` (nodes, batch).

    Args:
        batch: rows.
        count: answers and tokens that are drawn of a row, between two calls of `draw_all`.
        nodes: of a row's tree that are drawn.
        device: of the rows.
    """

    def __init__(self, batch: int, count: int, nodes: int, device: torch.device):
        self.numbers, self.siblings = (
            torch.empty(size, batch, dtype=torch.float64, device=device) for size in (count, nodes)
        )
        self._next = self._next_sibling = 0

    def draw_all(self) -> None:
        """Draw all numbers afresh, (count, batch), from torch's generator of the CPU."""
        for numbers in (self.numbers, self.siblings):
            if len(numbers):
                drawn = torch.rand(numbers.shape, dtype=torch.float64, device="cpu")
                numbers.copy_(drawn, non_blocking=True)

    def rewind(self) -> None:
        """Begin with the first number."""
        self._next = self._next_sibling = 0

    def may_look(self, device: torch.device) -> bool:
        """See [`Chance`]."""
        return False

    def accept(self, chances: Tensor) -> Tensor:
        """Accept with the given probabilities, of shape (batch,); see [`Chance`]."""
        return self._take() < chances

    def draw(self, probs: Tensor) -> Tensor:
        """A token of each distribution: (batch, vocab) → (batch,); -1 of what is none."""
        token, is_there = _place(probs.double(), self._take())
        return torch.where(is_there, token, -1)

    def draw_siblings(self, probs: Tensor, children: int) -> tuple[Tensor, Tensor]:
        """Draw tokens without replacement, one after the other; see [`Chance`]."""
        left, drawn, families = probs.double(), [], probs.shape[1]
        for _ in range(children):
            start = self._next_sibling
            self._next_sibling += families
            drawn.append(_place(left, self.siblings[start : start + families].T))
            left = left.scatter(2, drawn[-1][0][..., None], 0)
        tokens, is_there = zip(*drawn, strict=True)
        return torch.stack(tokens, dim=2), torch.stack(is_there, dim=2)

    def _take(self) -> Tensor:
        """The next numbers, of shape (batch,)."""
        self._next += 1
        return self.numbers[self._next - 1]


def _place(probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Find where numbers (...) below 1 lie in the cumulated `probs` (..., vocab).

    Returns:
        tokens (...), and whether there is a finite mass to draw from. One of probability 0 has no
        place, so that what was set to 0 is not drawn again.
    """
    mass = probs.cumsum(-1)
    total = mass[..., -1]
    place = torch.searchsorted(mass, (total * uniform)[..., None], right=True)[..., 0]
    return place.clamp(max=probs.shape[-1] - 1), total.isfinite() & (total > 0)


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
