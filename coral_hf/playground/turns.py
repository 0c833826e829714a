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
            used = min((call.used for call in self.calls), default=0.0)
            self.calls.append(turn := Turn(self, used))
        return turn

    def next(self) -> "Turn | None":
        """The call whose turn it is; None while another has not ended its own."""
        waiting = [call for call in self.calls if call.is_waiting]
        return None if self.holder else min(waiting, key=lambda call: call.used, default=None)


class Turn:
    """The turns of one call, with its clock and its random numbers.

    Holds the machine within its `with` block, but for `pass_on`.
    """

    def __init__(self, turns: Turns, used: float) -> None:
        self.seconds = 0.0
        self.is_waiting = False
        self._turns, self._before = turns, used
        self._random = random_states()

    @property
    def used(self) -> float:
        """Seconds by which the next call is chosen."""
        return self._before + self.seconds

    def __enter__(self) -> "Turn":
        with self._turns.changed:
            self.is_waiting = True
            self._turns.changed.wait_for(lambda: self._turns.next() is self)
            self.is_waiting, self._turns.holder = False, self
        set_random_states(self._random)
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        with self._turns.changed:
            self._turns.calls.remove(self)

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


def set_random_states(states: list[Tensor]) -> None:
    """Go on with the random numbers of other states."""
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:])
