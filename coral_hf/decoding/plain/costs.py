"""What rounds cost, in steps of plain `generate`: assumed, stored, or measured.

In: `RoundSample`s. Out: `Costs`. A clock measures passes of our own loop over one token a row, now
and then, which stand for steps of plain `generate`.
"""

import statistics
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

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


class CostModel:
    """Costs of a target: measured, and remembered by the process from call to call; or as given.

    Args:
        before: costs that are assumed until rounds were measured.
        model: the target; None: no clock changes costs, so that decisions follow from tokens alone.
    """

    # by rows, device and dtype
    _remembered: "WeakKeyDictionary[PreTrainedModel, dict[Hashable, Timings]]" = WeakKeyDictionary()

    def __init__(self, before: Costs, model: PreTrainedModel | None = None):
        self._costs, self.is_clock = before, model is not None
        if model is not None:
            self._timings = self._remembered.setdefault(model, {})
            self._place = model.device, model.dtype

    def _of(self, rows: int) -> Timings:
        new = Timings(DecayedLine(self._costs.node), self._costs.level)
        return self._timings.setdefault((rows, *self._place), new)

    def lacks_plain(self, rows: int) -> bool:
        """Whether plain passes are to be measured before any round can be judged."""
        return self.is_clock and len(self._of(rows).plain) < PROBES

    def plain(self, rows: int) -> float:
        """The cost of a plain pass: seconds, or 1 without a clock."""
        return statistics.median(self._of(rows).plain) if self.is_clock else 1.0

    def costs(self, rows: int) -> Costs:
        """What a tree would cost now."""
        if not self.is_clock:
            return self._costs
        timings = self._of(rows)
        return Costs(timings.rest.at_zero(self._costs.base), timings.level, timings.rest.slope)

    def note(self, sample: RoundSample) -> float:
        """Take a round into account, and return what it has cost."""
        if not self.is_clock:
            return self._costs.of_round(sample.levels, sample.nodes)
        timings = self._of(sample.rows)
        if sample.levels == 0:
            timings.plain.append(sample.decode)
            return 1.0
        if sample.decode < statistics.median(timings.plain):
            timings.plain.append(sample.decode)  # a pass over one token a row costs no more
        plain, costs = self.plain(sample.rows), self.costs(sample.rows)
        drafting = costs.level * sample.levels
        draft = min(sample.draft / plain, SPIKE * drafting)
        rest = (sample.decode + sample.read) / plain
        rest = min(rest, SPIKE * (costs.of_round(sample.levels, sample.nodes) - drafting))
        timings.level += (1 - FADING) * (draft / sample.levels - timings.level)
        timings.rest.add(sample.nodes - 1, rest)
        return draft + rest

    def forget_plain(self, rows: int) -> None:
        """Ask for new plain passes, where they would change anything."""
        if self.is_clock:
            self._of(rows).plain.clear()
