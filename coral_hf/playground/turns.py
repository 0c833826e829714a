"""One machine for several calls of `generate` at once: they use it in turn.

In: calls, each in a thread of its own, that pass their turn on between tokens. Out: the seconds
that each has used, as if it had had the machine for itself.

    call 1    ████      ████      ██             seconds 10
    call 2        ██████    ████████  ██████     seconds 20: the other has ended

No two of them run at any time, so whatever transformers or a drafter keep is never shared.
"""

import threading
import time

import torch
from torch import Tensor

SLICE = 0.03  # seconds of a turn at least


class Turns:
    """The machine: whoever has used it least goes next."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.calls: list[Turn] = []
        self.holder: Turn | None = None

    def enter(self) -> "Turn":
        """Join, with as much used as who has used it least."""
        with self.changed:
            self.calls.append(turn := Turn(self, min((one.used for one in self.calls), default=0)))
        return turn

    def is_free_for(self, turn: "Turn") -> bool:
        """Whether it is the turn of a call."""
        return self.holder is None and turn is min(self.calls, key=lambda call: call.used)


class Turn:
    """The turns of one call, with its clock and its random numbers.

    Holds the machine within its `with` block, but for `pass_on`; others wait for a call that has
    joined, so whoever joins begins at once.
    """

    def __init__(self, turns: Turns, used: float) -> None:
        self.seconds = 0.0
        self._turns, self._before = turns, used
        self._random = random_states()

    @property
    def used(self) -> float:
        """Seconds by which the next call is chosen."""
        return self._before + self.seconds

    def __enter__(self) -> "Turn":
        with self._turns.changed:
            self._turns.changed.wait_for(lambda: self._turns.is_free_for(self))
            self._turns.holder = self
        torch.set_rng_state(self._random[0])
        torch.cuda.set_rng_state_all(self._random[1:])
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        with self._turns.changed:
            self._turns.calls.remove(self)
            self._end()

    def pass_on(self) -> None:
        """Let others use the machine, where this turn has lasted long enough."""
        if time.perf_counter() - self._since > SLICE:
            self._end()
            self.__enter__()

    def _end(self) -> None:
        self.seconds += time.perf_counter() - self._since
        self._random = random_states()
        with self._turns.changed:
            self._turns.holder = None
            self._turns.changed.notify_all()


def random_states() -> list[Tensor]:
    """The states of torch's generators, the CPU's first."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
