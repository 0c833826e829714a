"""Sizes of tree among which adaptive drafting chooses between rounds, and the choice.

In: the largest tree, and what a round costs. Out: the tree of the next round. It is the one that is
expected to give the most tokens for its cost. What a size gives is a fading mean of its own rounds;
until it has any, what larger trees would have given had they been cut to its depth. A size that has
waited is expected to give a little more with each round, so that it is tried again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..draft_policy import AdaptiveDraft
from ..drafting import TreeShape
from ..plain.costs import FADING, CostModel, Costs, RoundSample

NUM_RUNGS = 3
CURIOSITY = 0.01  # what a size is expected to give more for each round that it has waited


def ladder(shape: TreeShape) -> list[TreeShape]:
    """The largest tree and smaller ones, each a level less deep and of half the nodes.

    6 levels, top-k 8, 32 nodes → 5, 4, 16 → 4, 2, 8
    """
    rungs = [shape]
    while len(rungs) < NUM_RUNGS and rungs[-1].depth > 1 and rungs[-1].nodes > 2:
        depth, nodes = rungs[-1].depth - 1, rungs[-1].nodes
        top_k = max(rungs[-1].top_k // 2, 1)
        rungs.append(shape._replace(depth=depth, top_k=top_k, nodes=max(nodes // 2, depth + 1)))
    return rungs


@dataclass
class _Rung:
    """What a size of tree costs and gives."""

    shape: TreeShape
    cost: float  # of a round, in plain passes
    tokens: float  # that a row is expected to get in a round
    rounds: int = 0  # that it had
    guesses: int = 0  # rounds of larger trees that told of it before
    waited: int = 0  # rounds since its last

    @property
    def promise(self) -> float:
        """Tokens that a plain pass spent on it is expected to give."""
        return self.tokens * (1 + CURIOSITY * self.waited) / self.cost

    def note(self, sample: RoundSample) -> None:
        """Take a round into account."""
        self.waited += 1
        most = min(sample.tokens, self.shape.depth + 1)
        if (sample.levels, sample.nodes) == (self.shape.depth, self.shape.nodes):
            self.rounds, self.waited = self.rounds + 1, 0
            self.tokens += max(1 / self.rounds, 1 - FADING) * (most - self.tokens)
        elif self.rounds == 0 and sample.nodes > self.shape.nodes:
            self.guesses += 1
            self.tokens += max(1 / self.guesses, 1 - FADING) * (most - self.tokens)


class RungDraft(AdaptiveDraft):
    """Drafts trees of a few sizes, and steps back to plain decoding when none of them pays."""

    def __init__(self, shapes: Sequence[TreeShape], costs: Costs):
        """`shapes`: the largest first, which is tried first."""
        super().__init__(shapes[0], CostModel(costs))
        self._rungs = [
            _Rung(shape, costs.of_round(shape.depth, shape.nodes), shape.depth + 1)
            for shape in shapes
        ]

    def plan(self, rows: int) -> TreeShape:
        """See [`DraftPolicy`]."""
        if not any(rung.rounds for rung in self._rungs):
            return self._rungs[0].shape
        return max(self._rungs, key=lambda rung: rung.promise).shape

    def note(self, sample: RoundSample) -> None:
        """See [`DraftPolicy`]."""
        super().note(sample)
        for rung in self._rungs:
            rung.note(sample)
