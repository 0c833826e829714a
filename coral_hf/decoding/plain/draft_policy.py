"""How much to draft in a round, and when to stop drafting: as much as pays.

In: what rounds cost and gave (`RoundSample`). Out: the shape of the next tree. Costs are counted in
plain passes of the target, which are steps of plain `generate`; see `costs.py`:

    cost of a round = base + level · levels drafted + node · nodes beside the root

A token is worth what one costs now, at most a plain pass. A node goes into the tree if the chance
that it is accepted, times the worth of a token, is no less than what a node costs; a level is
drafted if the chances of the nodes that it hangs on, together, are worth a level. What drafting has
lost against plain decoding since it last paid is its *regret*:

    regret ← max(0, regret + cost of the round in plain passes - tokens of a row)

Beyond `PATIENCE`, and `SPREADS` times the variance of the tokens of recent rounds, the rest of the
call is decoded plainly, unless recent rounds have paid on average; a clock measures plain passes
again before that, since a machine that slowed down slowed both. The more the tokens vary, the
higher regret climbs by chance although drafting pays.

Rounds of constant shapes have trees of one size, and are given up in the same way.
"""

from transformers import PreTrainedModel
from transformers.utils import logging

from ..drafting import TreeShape
from .costs import FADING, CostModel, Costs, RoundSample

logger = logging.get_logger(__name__)
SPECULATION = ("adaptive", "always", "never")
DEFAULT_SPECULATION = "adaptive"
PATIENCE = 2.0  # plain passes
SPREADS = 4.0  # plain passes a squared token
FIRST_CHECK = 8  # rounds after which a plain pass is measured again; then after twice as many, …
LEAST_WORTH = 0.05  # plain passes; of a token


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
        self._tokens, self._spread = 1.0, 0.0  # of a row in a recent round, and their variance
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
        beyond = sample.tokens - self._tokens
        self._tokens += (1 - FADING) * beyond
        self._spread += (1 - FADING) * (beyond**2 - self._spread)
        self._regret = max(0.0, self._regret + cost - sample.tokens)
        if self._regret > PATIENCE + SPREADS * self._spread:
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
    model: PreTrainedModel | None, shape: TreeShape, speculation: str, costs: Costs
) -> DraftPolicy:
    """The policy of a call.

    Args:
        model: the target; None: decide by `costs` alone, so that a seed gives the same text again.
        shape: the largest tree.
        speculation: `"adaptive"` or `"always"`.
        costs: those that `autotune` has found, or the ones to begin with.
    """
    if speculation == "always":
        return DraftPolicy(shape)
    return AdaptiveDraft(shape, CostModel(costs, model))
