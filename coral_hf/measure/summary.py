"""Statistics of calls: tau, speed-up, time by stage, acceptance by depth.

In: calls. Out: a Row for each method and group of calls, an AcceptedDepth for each method and
depth.

    pass            0 (prefill)   1            2        3
    emitted         x0            x1 x2 x3     x4       x5 x6
    round_lengths                 3            1        2       tau = 6 / 3 = 2 tokens a round
    accepted                      2            0        1       depth 1: 2 of 3, depth 2: 1 of 3
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isnan
from statistics import fmean
from typing import Any, Literal

from pandas import DataFrame, Series

from .calls import Call

OVERALL = "overall"


@dataclass(frozen=True)
class Row:
    """The numbers of one method on one group of calls; None where nothing was counted."""

    task: str
    batch_size: int
    method: str
    num_items: int  # batches, or turns of prompts
    num_tokens: int  # of one call on each item
    tau_per_token: float | None  # tokens of all rounds / rounds
    tau_per_item: float | None  # mean of that ratio over calls
    tokens_per_second: float  # all tokens / all seconds, prefill included
    speedup: float | None  # median over items of plain's seconds per token / the method's
    decoding_speedup: float | None  # the same without the prefill and its tokens
    speedup_per_tau: float | None  # the share of tau that drafting and wider passes leave
    stage_milliseconds: dict[str, float]  # "prefill" a call; "draft", "verify", "other" a round
    peak_mebibytes: float | None  # of GPU memory
    exact_match: float | None  # share of the answers whose tokens are all plain's

    @property
    def round_stages(self) -> str | None:
        """The milliseconds of a round, stage by stage."""
        stages = [ms for name, ms in self.stage_milliseconds.items() if name != "prefill"]
        return " + ".join(f"{ms:.2f}" for ms in stages) or None


@dataclass(frozen=True)
class AcceptedDepth:
    """How often a method accepted a node at one depth of the tree."""

    method: str
    depth: int  # 1 is a child of the root
    share: float  # of all rounds
    share_given_parent: float  # of the rounds that accepted a node at the depth before


def summarise_tasks(calls: Sequence[Call]) -> list[Row]:
    """Summarise calls by task and method, the overall rows last."""
    return summarise([*calls, *(replace(call, task=OVERALL) for call in calls)], "task")


def summarise(calls: Sequence[Call], group: Literal["task", "num_rows"]) -> list[Row]:
    """Summarise calls by group in their order, and in each group by method, plain first."""
    plain_first = sorted(calls, key=lambda call: call.method != "plain")
    groups = [grouped(own, "method") for own in grouped(plain_first, group).values()]
    return [summarise_method(own, group["plain"]) for group in groups for own in group.values()]


def grouped(calls: Iterable[Call], name: str) -> dict[Any, list[Call]]:
    """Group calls by a field or property, in the order of their first."""
    groups: dict[Any, list[Call]] = {}
    for call in calls:
        groups.setdefault(getattr(call, name), []).append(call)
    return groups


def summarise_method(own: Sequence[Call], plain: Sequence[Call]) -> Row:
    """Summarise the calls of one method in a group, beside those of plain `generate`."""
    tau = tau_per_token(own)
    speedup = median_ratio(plain, own, "seconds_per_token")
    equal = [call.num_equal_rows for call in own if call.num_equal_rows is not None]
    peaks = [call.peak_bytes / 2**20 for call in own if call.peak_bytes is not None]
    return Row(
        task=own[0].task,
        batch_size=own[0].num_rows,
        method=own[0].method,
        num_items=len({call.item for call in own}),
        num_tokens=sum(call.num_tokens for call in own if call.repeat == 0),
        tau_per_token=tau,
        tau_per_item=tau_per_item(own),
        tokens_per_second=sum(call.num_tokens for call in own) / sum(c.seconds for c in own),
        speedup=speedup,
        decoding_speedup=median_ratio(plain, own, "decoding_seconds_per_token"),
        speedup_per_tau=speedup / tau if speedup and tau else None,
        stage_milliseconds=stage_milliseconds(own),
        peak_mebibytes=max(peaks, default=None),
        exact_match=sum(equal) / sum(call.num_rows for call in own) if equal else None,
    )


def tau_per_token(calls: Iterable[Call]) -> float | None:
    """Divide the tokens of all rounds by the rounds: long answers weigh more."""
    lengths = [length for call in calls for length in call.round_lengths]
    return fmean(lengths) if lengths else None


def tau_per_item(calls: Iterable[Call]) -> float | None:
    """Average the ratios of the answers: every answer weighs the same."""
    taus = [fmean(call.round_lengths) for call in calls if call.round_lengths]
    return fmean(taus) if taus else None


def median_ratio(plain: Sequence[Call], own: Sequence[Call], cost: str) -> float | None:
    """Divide plain's cost of each item by the method's, each the median of its repeats.

    Returns:
        the median over items; None where no call has that cost, a property of `Call`.
    """
    expected, found = (
        Series([getattr(call, cost) for call in calls], [call.item for call in calls], dtype=float)
        .groupby(level=0)
        .median()
        for calls in (plain, own)
    )
    ratio = (expected / found).median()
    return None if isnan(ratio) else ratio


def stage_milliseconds(calls: Sequence[Call]) -> dict[str, float]:
    """Average the time of the prefill in a call, and of each other stage in a round."""
    sums = DataFrame([call.stage_seconds for call in calls]).sum()
    num_rounds = sum(call.num_rounds for call in calls)
    counts = {stage: len(calls) if stage == "prefill" else num_rounds for stage in sums.index}
    return {stage: 1000 * sums[stage] / count for stage, count in counts.items() if count}


def accepted_depths(calls: Sequence[Call]) -> list[AcceptedDepth]:
    """Count how deep the rounds of each method accept; one cut short counts by what it emitted."""
    found = []
    for method, own in grouped(calls, "method").items():
        lengths = [length for call in own for length in call.round_lengths]
        # at a depth: the rounds that accepted so many nodes, and emitted one token more
        rounds = [sum(n > depth for n in lengths) for depth in range(max(lengths, default=0))]
        for depth, (before, here) in enumerate(pairwise(rounds), start=1):
            found.append(AcceptedDepth(method, depth, here / rounds[0], here / before))
    return found
