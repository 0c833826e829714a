"""How much to draft in a round, and when to stop drafting: as much as pays.

In: what rounds cost and gave (`RoundSample`). Out: the shape of the next tree. Costs are counted in
plain passes of the target, which read one token a row, as plain `generate` does:

    cost of a round = base + level · levels drafted + node · nodes beside the root

A token is worth what one costs now, at most a plain pass. A node goes into the tree if the chance
that it is accepted, times the worth of a token, is no less than what a node costs; a level is
drafted if the chances of the nodes that it hangs on, together, are worth a level. What drafting has
lost against plain decoding since it last paid is its *regret*:

    regret ← max(0, regret + cost of the round in plain passes - tokens of a row)

At `PATIENCE` the rest of the call is decoded plainly, unless recent rounds have paid on average;
a clock measures plain passes again before that, since a machine that slowed down slowed both.
"""

import statistics
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel
from transformers.utils import logging

from .drafting import TreeShape

logger = logging.get_logger(__name__)
SPECULATION = ("adaptive", "always", "never")
DEFAULT_SPECULATION = "adaptive"
PATIENCE = 2.0  # plain passes
FIRST_CHECK = 8  # rounds after which a plain pass is measured again; then after twice as many, …
LEAST_WORTH = 0.05  # plain passes; of a token
PROBES = 3  # the newest plain passes, whose median counts
FADING = 0.9  # what a round counts for, once there is a newer one
TRUST = 100.0  # of the assumed cost of a node: as much as two rounds 14 nodes apart
SPIKE = 4.0  # a round counts as at most so many times what was expected


class Costs(NamedTuple):
    """The parts of a round's cost, in plain passes; defaults are cautious for 16 layers or more."""

    base: float = 1.1  # the pass over the root, and all that no tree changes
    level: float = 0.1  # a level that the drafter drafts
    node: float = 0.01  # a node beside the root in the target's pass

    def of_round(self, levels: int, nodes: int) -> float:
        """A round that drafted so many levels and read so many nodes, the root included."""
        return self.base + self.level * levels + self.node * (nodes - 1)


class RoundSample(NamedTuple):
    """What a round did, and the seconds it took."""

    rows: int
    levels: int  # 0 in a plain round
    nodes: int  # of a row, the root included
    tokens: float  # of a row
    draft: float = 0.0  # seconds of its levels
    decode: float = 0.0  # seconds of the target's pass, of choosing tokens and of keeping them
    read: float = 0.0  # seconds in which the drafter reads the new tokens


class CostModel:
    """Costs that no clock changes, so that decisions follow from tokens alone."""

    is_clock = False  # whether rounds are timed

    def __init__(self, costs: Costs):
        self._costs = costs

    def lacks_plain(self, rows: int) -> bool:
        """Whether plain passes are to be measured before any round can be judged."""
        return False

    def plain(self, rows: int) -> float:
        """The cost of a plain pass, in a unit of the model's own."""
        return 1.0

    def costs(self, rows: int) -> Costs:
        """What a tree would cost now."""
        return self._costs

    def note(self, sample: RoundSample) -> float:
        """Take a round into account, and return what it has cost."""
        return self._costs.of_round(sample.levels, sample.nodes)

    def forget_plain(self, rows: int) -> None:
        """Ask for new plain passes, where they would change anything."""


@dataclass
class DecayedLine:
    """A straight line through points, of which older ones count less."""

    slope_before: float  # assumed until the points tell
    sums: tuple[float, ...] = (0.0,) * 5  # of the points' weights, and of x, y, xx and xy by weight

    def add(self, x: float, y: float) -> None:
        """Take the newest point."""
        newest = (1.0, x, y, x * x, x * y)
        self.sums = tuple(FADING * old + new for old, new in zip(self.sums, newest, strict=True))

    @property
    def slope(self) -> float:
        """Slope of the best line, drawn towards the slope assumed; never falling."""
        weight, x, y, xx, xy = self.sums
        if weight == 0:
            return self.slope_before
        together = xy - x * y / weight + TRUST * self.slope_before
        return max(together / (xx - x * x / weight + TRUST), 0.0)

    def at_zero(self, otherwise: float) -> float:
        """The height at x = 0; `otherwise` without a point."""
        weight, x, y, *_ = self.sums
        return max((y - self.slope * x) / weight if weight else otherwise, 0.0)


@dataclass
class Timings:
    """What was measured of one target at one number of rows."""

    rest: DecayedLine  # nodes beside the root → passes of all but the levels
    level: float  # passes
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=PROBES))  # seconds


class MeasuredCosts(CostModel):
    """Costs of one target, remembered by the process from call to call."""

    is_clock = True

    _remembered: "WeakKeyDictionary[PreTrainedModel, dict[Hashable, Timings]]" = WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel, before: Costs):
        """`before`: costs that are assumed until rounds were measured."""
        super().__init__(before)
        self._timings = self._remembered.setdefault(model, {})
        self._kind = (model.device, model.dtype)

    def _of(self, rows: int) -> Timings:
        new = Timings(DecayedLine(self._costs.node), self._costs.level)
        return self._timings.setdefault((rows, *self._kind), new)

    def lacks_plain(self, rows: int) -> bool:
        """See [`CostModel`]."""
        return len(self._of(rows).plain) < PROBES

    def plain(self, rows: int) -> float:
        """See [`CostModel`]. In seconds."""
        return statistics.median(self._of(rows).plain)

    def costs(self, rows: int) -> Costs:
        """See [`CostModel`]."""
        timings = self._of(rows)
        return Costs(timings.rest.at_zero(self._costs.base), timings.level, timings.rest.slope)

    def note(self, sample: RoundSample) -> float:
        """See [`CostModel`]."""
        timings = self._of(sample.rows)
        if sample.levels == 0:
            timings.plain.append(sample.decode)
            return 1.0
        plain, costs = self.plain(sample.rows), self.costs(sample.rows)
        drafting = costs.level * sample.levels
        draft = min(sample.draft / plain, SPIKE * drafting)
        rest = (sample.decode + sample.read) / plain
        rest = min(rest, SPIKE * (costs.of_round(sample.levels, sample.nodes) - drafting))
        timings.level += (1 - FADING) * (draft / sample.levels - timings.level)
        timings.rest.add(sample.nodes - 1, rest)
        return draft + rest

    def forget_plain(self, rows: int) -> None:
        """See [`CostModel`]."""
        self._of(rows).plain.clear()


class DraftPolicy:
    """What the loop asks before a round, and reports to after it; here nothing changes."""

    def __init__(self, shape: TreeShape):
        """`shape`: the largest tree, which is drafted in every round."""
        self._shape = shape
        self.is_plain = False  # whether the drafter is done with this call

    def plan(self, rows: int) -> TreeShape:
        """The largest tree of the next round; of depth 0 for a plain round."""
        return self._shape

    def note(self, sample: RoundSample) -> None:
        """Take a round into account."""


class AdaptiveDraft(DraftPolicy):
    """Drafts what pays, and steps back to plain decoding when nothing does."""

    def __init__(self, shape: TreeShape, model: CostModel):
        super().__init__(shape)
        self._model = model
        self._regret = 0.0
        self._cost = 1.0  # of a recent round
        self._tokens = 1.0  # of a row in a recent round
        self._rounds, self._next_check = 0, FIRST_CHECK
        self._doubted: float | None = None  # a plain pass as it was known when doubts came

    def plan(self, rows: int) -> TreeShape:
        """See [`DraftPolicy`]."""
        if self._model.lacks_plain(rows) or self._is_check:
            return self._shape._replace(depth=0)
        costs, worth = self._model.costs(rows), self.worth
        return self._shape._replace(node_floor=costs.node / worth, level_floor=costs.level / worth)

    @property
    def worth(self) -> float:
        """What a token costs now, in plain passes."""
        return min(max(self._cost / self._tokens, LEAST_WORTH), 1.0)

    @property
    def _is_check(self) -> bool:
        return self._model.is_clock and self._rounds == self._next_check

    def note(self, sample: RoundSample) -> None:
        """See [`DraftPolicy`]."""
        cost = self._model.note(sample)
        if self._is_check:
            self._next_check *= 2
        if sample.levels == 0:
            return self._settle_doubts(sample.rows)
        self._rounds += 1
        self._cost += (1 - FADING) * (cost - self._cost)
        self._tokens += (1 - FADING) * (sample.tokens - self._tokens)
        self._regret = max(0.0, self._regret + cost - sample.tokens)
        if self._regret > PATIENCE:
            self._doubted = self._model.plain(sample.rows)
            self._model.forget_plain(sample.rows)
            self._settle_doubts(sample.rows)

    def _settle_doubts(self, rows: int) -> None:
        """Once plain passes are known afresh, step back, or continue if recent rounds still pay."""
        if self._doubted is None or self._model.lacks_plain(rows):
            return
        self._cost *= self._doubted / self._model.plain(rows)
        self._doubted, self._regret = None, 0.0
        self.is_plain = self._cost > self._tokens
        if self.is_plain:
            logger.warning_once(
                "Drafting is slower than plain decoding with this target and drafter; the rest of"
                " the text is decoded plainly. `autotune(drafter, target, prompts)` finds the tree"
                ' that pays best; `speculation="always"` drafts all the same.'
            )


def choose_speculation(speculation: str | None) -> str:
    """One of `SPECULATION`: the one that is asked for, or the default."""
    speculation = DEFAULT_SPECULATION if speculation is None else speculation
    if speculation not in SPECULATION:
        raise ValueError(f"`speculation` is {speculation!r}; use one of {SPECULATION}.")
    return speculation


def choose_policy(
    model: PreTrainedModel,
    shape: TreeShape,
    speculation: str,
    stored: dict[str, float] | None,
    do_sample: bool,
) -> DraftPolicy:
    """The policy of a call.

    Args:
        model: the target.
        shape: the largest tree.
        speculation: `"adaptive"` or `"always"`.
        stored: the `Costs` that `autotune` has found, by name.
        do_sample: decide by stored costs alone, so that a seed gives the same text again.
    """
    if speculation == "always":
        return DraftPolicy(shape)
    costs = Costs(**(stored or {}))
    return AdaptiveDraft(shape, CostModel(costs) if do_sample else MeasuredCosts(model, costs))
