"""The numbers of a report: tau, speed-up, time by stage, acceptance by depth.

In: runs. Out: a Row for each method and task, and an AcceptedDepth for each method and depth.

    pass            0 (prefill)   1            2        3
    emitted         x0            x1 x2 x3     x4       x5 x6
    round_lengths                 3            1        2       tau = 6 / 3 = 2 tokens a pass
    accepted                      2            0        1       depth 1: 2 of 3, depth 2: 1 of 3
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from .runs import Run

OVERALL = "overall"
Cost = Callable[[Run], float | None]


@dataclass(frozen=True)
class Row:
    """One method on one task; None where there is nothing to divide by."""

    task: str
    method: str
    num_items: int  # turns of prompts
    num_tokens: int
    tau_per_token: float | None  # tokens of all rounds / rounds
    tau_per_item: float | None  # mean of that ratio over runs
    tokens_per_second: float  # all tokens / all seconds, prefill included
    speedup: float  # median over items of plain's seconds per token / the method's
    decoding_speedup: float | None  # the same without the prompt's pass and its token
    speedup_per_tau: float | None  # the share of tau that the drafting and the wider passes leave
    stage_milliseconds: dict[str, float]  # "prefill" a call; "draft", "verify", "other" a round
    peak_bytes: int | None
    exact_match: float | None  # share of runs whose tokens are all plain's


@dataclass(frozen=True)
class AcceptedDepth:
    """How often a node at this depth of the tree was accepted."""

    method: str
    depth: int  # 1 is a child of the root
    share: float  # of all rounds
    share_given_parent: float  # of the rounds that accepted a node at the depth before


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Rows by task in the order of the runs, then overall."""
    tasks = dict.fromkeys(run.task for run in runs)
    rows = [
        row for task in tasks for row in rows_of(task, [run for run in runs if run.task == task])
    ]
    return rows + rows_of(OVERALL, runs)


def rows_of(task: str, runs: Sequence[Run]) -> list[Row]:
    by_method = group_by_method(runs)
    return [row_of(task, method, by_method) for method in by_method]


def row_of(task: str, method: str, by_method: dict[str, list[Run]]) -> Row:
    runs = by_method[method]
    tau = tau_per_token(run.round_lengths for run in runs)
    speedup = median(ratios(by_method["plain"], runs, lambda run: run.seconds_per_token))
    decoding = ratios(by_method["plain"], runs, lambda run: run.decoding_seconds_per_token)
    matches = [run.equals_plain for run in runs if run.equals_plain is not None]
    return Row(
        task=task,
        method=method,
        num_items=len({run.item for run in runs}),
        num_tokens=sum(run.num_tokens for run in runs),
        tau_per_token=tau,
        tau_per_item=tau_per_item(run.round_lengths for run in runs),
        tokens_per_second=sum(run.num_tokens for run in runs) / sum(run.seconds for run in runs),
        speedup=speedup,
        decoding_speedup=median(decoding) if decoding else None,
        speedup_per_tau=None if tau is None else speedup / tau,
        stage_milliseconds=stage_milliseconds(runs),
        peak_bytes=max(
            (run.peak_bytes for run in runs if run.peak_bytes is not None), default=None
        ),
        exact_match=fmean(matches) if matches else None,
    )


def group_by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.method].append(run)
    return dict(sorted(groups.items(), key=lambda group: group[0] != "plain"))


def tau_per_token(round_lengths: Iterable[Sequence[int]]) -> float | None:
    """Tokens of all rounds over all rounds: long answers weigh more."""
    lengths = [length for run in round_lengths for length in run]
    return fmean(lengths) if lengths else None


def tau_per_item(round_lengths: Iterable[Sequence[int]]) -> float | None:
    """The mean of each answer's own ratio: every answer weighs the same."""
    taus = [fmean(run) for run in round_lengths if run]
    return fmean(taus) if taus else None


def ratios(plain: Sequence[Run], runs: Sequence[Run], cost: Cost) -> list[float]:
    """For each item: plain's cost / the method's, each the median of its repeats."""
    expected, found = cost_by_item(plain, cost), cost_by_item(runs, cost)
    return [expected[item] / found[item] for item in found if item in expected]


def cost_by_item(runs: Sequence[Run], cost: Cost) -> dict[int, float]:
    by_item: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        if (value := cost(run)) is not None:
            by_item[run.item].append(value)
    return {item: median(values) for item, values in by_item.items()}


def stage_milliseconds(runs: Sequence[Run]) -> dict[str, float]:
    """Mean time of the prefill in a call, and of each other stage in a round."""
    num_rounds = sum(len(run.round_lengths) for run in runs)
    stages = dict.fromkeys(stage for run in runs for stage in run.stage_seconds)
    counts = {stage: len(runs) if stage == "prefill" else num_rounds for stage in stages}
    return {
        stage: 1000 * sum(run.stage_seconds[stage] for run in runs) / count
        for stage, count in counts.items()
        if count
    }


def accepted_depths(runs: Sequence[Run]) -> list[AcceptedDepth]:
    """How far down the tree the rounds of each method went; one cut short counts as emitted."""
    by_method = group_by_method(runs)
    return [
        entry
        for method, group in by_method.items()
        if method != "plain"
        for entry in accepted_depths_of(
            method, [length - 1 for run in group for length in run.round_lengths]
        )
    ]


def accepted_depths_of(method: str, accepted: Sequence[int]) -> list[AcceptedDepth]:
    """From the number of accepted nodes of each round."""
    reached = [
        sum(count >= depth for count in accepted) for depth in range(max(accepted, default=0) + 1)
    ]
    return [
        AcceptedDepth(
            method, depth, reached[depth] / len(accepted), reached[depth] / reached[depth - 1]
        )
        for depth in range(1, len(reached))
    ]
