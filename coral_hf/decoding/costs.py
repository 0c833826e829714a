"""What a round costs, in plain passes of the target: measured while rounds go by, or stored.

In: what each round did and the seconds it took (`Spent`). Out: `Costs`. A plain pass reads one
token a row, as plain `generate` does, so a round pays if it costs less than the tokens it gives.

    cost of a round = base + level · levels drafted + node · nodes beside the root
"""

import statistics
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from .tree import DraftTree
from .verification import Verdict

PROBES = 3  # the newest plain passes, whose median counts
FADING = 0.9  # what a round counts for, once there is a newer one
TRUST = 100.0  # of the assumed cost of a node: as much as two rounds 14 nodes apart
SPIKE = 4.0  # a round counts as at most so many times what was expected


class Costs(NamedTuple):
    """The parts of a round's cost, in plain passes over the same rows.

    The defaults are assumed where nothing was measured: cautious for a target of 16 layers or more.
    """

    base: float = 1.1  # the pass over the root, and all that no tree changes
    level: float = 0.1  # a level that the drafter drafts
    node: float = 0.01  # a node beside the root in the target's pass

    def of(self, levels: int, nodes: int) -> float:
        """A round that drafted so many levels and read so many nodes, the root included."""
        return self.base + self.level * levels + self.node * (nodes - 1)


class Spent(NamedTuple):
    """What a round did, and the seconds it took."""

    rows: int
    levels: int  # 0 in a plain round
    nodes: int  # of a row, the root included
    tokens: float  # of a row
    draft: float = 0.0  # seconds of its levels
    decode: float = 0.0  # seconds of the target's pass, of choosing tokens and of keeping them
    read: float = 0.0  # seconds in which the drafter reads the new tokens

    @classmethod
    def of(cls, tree: DraftTree, verdicts: list[Verdict], *seconds: float) -> "Spent":
        """Of a batch of trees; `seconds`: `draft`, `decode` and `read`."""
        tokens = sum(len(verdict.tokens) for verdict in verdicts) / len(verdicts)
        nodes = tree.tokens.shape[1]
        levels = tree.levels or min(nodes - 1, 1)  # not every tree tells
        return cls(len(verdicts), levels, nodes, tokens, *seconds)


class Meter(Protocol):
    """Where `Pace` reads costs."""

    is_clock: bool  # whether rounds are timed

    def lacks_plain(self, rows: int) -> bool:
        """Whether plain passes are to be measured before any round can be judged."""
        ...

    def plain(self, rows: int) -> float:
        """A plain pass, in a unit of the meter's own."""
        ...

    def costs(self, rows: int) -> Costs:
        """What a tree would cost now."""
        ...

    def note(self, spent: Spent) -> float:
        """Take a round into account, and say what it has cost."""
        ...

    def forget_plain(self, rows: int) -> None:
        """Ask for new plain passes, where they would change anything."""
        ...


class StoredCosts:
    """Costs that no clock changes, so that decisions follow from tokens alone."""

    is_clock = False

    def __init__(self, costs: Costs):
        self._costs = costs

    def lacks_plain(self, rows: int) -> bool:
        """See [`Meter`]."""
        return False

    def plain(self, rows: int) -> float:
        """See [`Meter`]."""
        return 1.0

    def costs(self, rows: int) -> Costs:
        """See [`Meter`]."""
        return self._costs

    def note(self, spent: Spent) -> float:
        """See [`Meter`]."""
        return self._costs.of(spent.levels, spent.nodes)

    def forget_plain(self, rows: int) -> None:
        """See [`Meter`]."""


@dataclass
class Line:
    """A straight line through points, of which older ones count less."""

    slope_before: float  # assumed until the points tell
    weight: float = 0.0
    x: float = 0.0  # weighted sums
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Take the newest point."""
        for name, value in (("weight", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, FADING * getattr(self, name) + value)

    @property
    def slope(self) -> float:
        """Of the best line, drawn towards the slope assumed; never falling."""
        if self.weight == 0:
            return self.slope_before
        spread = self.xx - self.x * self.x / self.weight
        together = self.xy - self.x * self.y / self.weight
        return max((together + TRUST * self.slope_before) / (spread + TRUST), 0.0)

    def at_zero(self, otherwise: float) -> float:
        """The height at x = 0; `otherwise` without a point."""
        if self.weight == 0:
            return otherwise
        return max((self.y - self.slope * self.x) / self.weight, 0.0)


@dataclass
class Timings:
    """What was measured of one target at one number of rows."""

    rest: Line  # nodes beside the root → passes of all but the levels
    level: float  # passes
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=PROBES))  # seconds


class MeasuredCosts:
    """Costs of one target, remembered by the process from call to call."""

    is_clock = True

    _remembered: "WeakKeyDictionary[PreTrainedModel, dict[Hashable, Timings]]" = WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel, before: Costs):
        """`before`: costs that are assumed until rounds were measured."""
        self._timings = self._remembered.setdefault(model, {})
        self._kind = (model.device, model.dtype)
        self._before = before

    def _of(self, rows: int) -> Timings:
        new = Timings(Line(self._before.node), self._before.level)
        return self._timings.setdefault((rows, *self._kind), new)

    def lacks_plain(self, rows: int) -> bool:
        """See [`Meter`]."""
        return len(self._of(rows).plain) < PROBES

    def plain(self, rows: int) -> float:
        """See [`Meter`]. In seconds."""
        return statistics.median(self._of(rows).plain)

    def costs(self, rows: int) -> Costs:
        """See [`Meter`]."""
        timings = self._of(rows)
        return Costs(timings.rest.at_zero(self._before.base), timings.level, timings.rest.slope)

    def note(self, spent: Spent) -> float:
        """See [`Meter`]."""
        timings = self._of(spent.rows)
        if spent.levels == 0:
            timings.plain.append(spent.decode)
            return 1.0
        plain, costs = self.plain(spent.rows), self.costs(spent.rows)
        drafting = costs.level * spent.levels
        draft = min(spent.draft / plain, SPIKE * drafting)
        rest = (spent.decode + spent.read) / plain
        rest = min(rest, SPIKE * (costs.of(spent.levels, spent.nodes) - drafting))
        timings.level += (1 - FADING) * (draft / spent.levels - timings.level)
        timings.rest.add(spent.nodes - 1, rest)
        return draft + rest

    def forget_plain(self, rows: int) -> None:
        """See [`Meter`]."""
        self._of(rows).plain.clear()
