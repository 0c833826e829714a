"""How much to draft in a round, and when to stop drafting: as much as pays.

In: what rounds cost and gave. Out: the shape of the next tree. A token is worth what one costs now,
at most a plain pass. A node goes into the tree if the chance that it is accepted, times the worth
of a token, is no less than what a node costs; a level is drafted if the chances of the nodes that
it hangs on, together, are worth a level.

What drafting has lost against plain decoding since it last paid is its *regret*:

    regret ← max(0, regret + cost of the round in plain passes - tokens of a row)

At `PATIENCE` plain passes the rest of the call is decoded plainly, unless recent rounds have paid
on average; where a clock is read, plain passes are measured afresh before that, since a machine
that slowed down slowed both.
"""

from typing import Protocol

from transformers import PreTrainedModel
from transformers.utils import logging

from .costs import FADING, Costs, MeasuredCosts, Meter, Spent, StoredCosts
from .tree import TreeShape

logger = logging.get_logger(__name__)

SPECULATION = ("adaptive", "always", "never")
DEFAULT_SPECULATION = "adaptive"
PATIENCE = 2.0  # plain passes
FIRST_CHECK = 8  # rounds after which a plain pass is measured again; then after twice as many, …
LEAST_WORTH = 0.05  # plain passes; of a token


class Pace(Protocol):
    """What the loop asks before a round, and tells after it."""

    is_plain: bool  # whether the drafter is done with this call

    def plan(self, rows: int) -> TreeShape:
        """The largest tree of the next round; of depth 0 for a plain round."""
        ...

    def note(self, spent: Spent) -> None:
        """Take a round into account."""
        ...


class Always:
    """Drafts the largest tree in every round."""

    is_plain = False

    def __init__(self, shape: TreeShape):
        self._shape = shape

    def plan(self, rows: int) -> TreeShape:
        """See [`Pace`]."""
        return self._shape

    def note(self, spent: Spent) -> None:
        """See [`Pace`]."""


class Never:
    """Leaves the drafter alone."""

    is_plain = True

    def __init__(self, shape: TreeShape):
        self._shape = shape._replace(depth=0)

    def plan(self, rows: int) -> TreeShape:
        """See [`Pace`]."""
        return self._shape

    def note(self, spent: Spent) -> None:
        """See [`Pace`]."""


class Adaptive:
    """Drafts what pays, and steps back to plain decoding when nothing does."""

    def __init__(self, shape: TreeShape, meter: Meter):
        """`shape`: the largest tree."""
        self.is_plain = False
        self._shape = shape
        self._meter = meter
        self._regret = 0.0
        self._cost = 1.0  # of a recent round
        self._tokens = 1.0  # of a row in a recent round
        self._rounds, self._next_check = 0, FIRST_CHECK
        self._doubted: float | None = None  # a plain pass as it was known when doubts came

    def plan(self, rows: int) -> TreeShape:
        """See [`Pace`]."""
        if self.is_plain or self._meter.lacks_plain(rows) or self._is_check:
            return self._shape._replace(depth=0)
        costs, worth = self._meter.costs(rows), self.worth
        return self._shape._replace(node_floor=costs.node / worth, level_floor=costs.level / worth)

    @property
    def worth(self) -> float:
        """What a token costs now, in plain passes."""
        return min(max(self._cost / self._tokens, LEAST_WORTH), 1.0)

    @property
    def _is_check(self) -> bool:
        return self._meter.is_clock and self._rounds == self._next_check

    def note(self, spent: Spent) -> None:
        """See [`Pace`]."""
        cost = self._meter.note(spent)
        if self.is_plain:
            return
        if self._is_check:
            self._next_check *= 2
        if spent.levels == 0:
            self._settle_doubts(spent.rows)
            return
        self._rounds += 1
        self._cost += (1 - FADING) * (cost - self._cost)
        self._tokens += (1 - FADING) * (spent.tokens - self._tokens)
        self._regret = max(0.0, self._regret + cost - spent.tokens)
        if self._regret > PATIENCE:
            self._doubt(spent.rows)

    def _doubt(self, rows: int) -> None:
        self._doubted = self._meter.plain(rows)
        self._meter.forget_plain(rows)
        self._settle_doubts(rows)

    def _settle_doubts(self, rows: int) -> None:
        """Once plain passes are known afresh, step back, or go on if recent rounds still pay."""
        if self._doubted is None or self._meter.lacks_plain(rows):
            return
        self._cost *= self._doubted / self._meter.plain(rows)
        self._doubted, self._regret = None, 0.0
        if self._cost > self._tokens:
            self._step_back()

    def _step_back(self) -> None:
        self.is_plain = True
        logger.warning_once(
            "Drafting is slower than plain decoding on this machine with this target and drafter;"
            " the rest of the text is decoded plainly, as it will be in other calls where drafting"
            " does not pay. `autotune(drafter, target, prompts)` finds the tree that pays best;"
            ' `speculation="always"` drafts all the same.'
        )


def choose_pace(
    model: PreTrainedModel,
    shape: TreeShape,
    speculation: str | None,
    stored: dict[str, float] | None,
    do_sample: bool,
) -> Pace:
    """The pace of a call.

    Args:
        model: the target.
        shape: the largest tree.
        speculation: of `SPECULATION`, the default where None.
        stored: the `Costs` that `autotune` has found, by name.
        do_sample: decide by stored costs alone, so that a seed gives the same text again.
    """
    speculation = DEFAULT_SPECULATION if speculation is None else speculation
    if speculation not in SPECULATION:
        raise ValueError(f"`speculation` is {speculation!r}; use one of {SPECULATION}.")
    if speculation != "adaptive":
        return Always(shape) if speculation == "always" else Never(shape)
    costs = Costs(**(stored or {}))
    return Adaptive(shape, StoredCosts(costs) if do_sample else MeasuredCosts(model, costs))
