"""Chance: where a call draws all that it draws, acceptances, tokens and siblings.

In: probabilities. Out: draws, in float64, from torch's generator of the CPU. Each is exact whatever
torch's default dtype and device are, and a seed gives the same ones again.
"""

import torch
from torch import Tensor


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


Draws = Chance | Uniforms


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
