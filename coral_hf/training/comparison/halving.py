"""Successive halving (Jamieson and Talwalkar 2016): many trials shortly, the better ones longer."""

from collections.abc import Sequence
from typing import NamedTuple

from .results import Result
from .run import Comparison
from .trial import Trial


class Rung(NamedTuple):
    """One round of a search."""

    steps: int  # of each training
    results: list[Result]  # the best first


def halve(
    comparison: Comparison, trials: Sequence[Trial], steps: int, keep: int, seed: int = 0
) -> list[Rung]:
    """Train all trials for `steps`, the better half for twice as long, and so on.

    Every rung trains from nothing, since a learning rate that falls to its end cannot go on.

    Args:
        keep: trials that are left at the end.
    """
    if keep < 1:
        raise ValueError(f"`keep` is {keep}; keep at least 1 trial.")
    rungs, left = [], list(trials)
    while True:
        results = [comparison.result(trial, seed, steps) for trial in left]
        order = sorted(range(len(left)), key=lambda i: -results[i].mean_acceptance)
        rungs.append(Rung(steps, [results[i] for i in order]))
        if len(left) <= keep:
            return rungs
        left = [left[i] for i in order[: max(-(-len(left) // 2), keep)]]
        steps *= 2
