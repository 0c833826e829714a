"""Statistics of calls: tau, speed-up, time by stage, acceptance by depth.

In: calls. Out: a Row for each method and group of calls, an AcceptedDepth for each method and
depth.

    pass            0 (prefill)   1            2        3
    emitted         x0            x1 x2 x3     x4       x5 x6
    round_lengths                 3            1        2       tau = 6 / 3 = 2 tokens a round
    accepted                      2            0        1       depth 1: 2 of 3, depth 2: 1 of 3
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from statistics import fmean, median
from typing import Literal

from .calls import Call

OVERALL = "overall"
Cost = Callable[[Call], float | None]


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
    rounds_per_second: float | None  # passes of the target, without the prefill
    tokens_per_second: float  # all tokens / all seconds, prefill included
    speedup: float  # median over items of plain's seconds per token / the method's
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
    name = attrgetter(group)
    groups = (
        by_method(call for call in calls if name(call) == value)
        for value in dict.fromkeys(map(name, calls))
    )
    return [summarise_method(method, own) for own in groups for method in own]


def summarise_method(method: str, calls: dict[str, list[Call]]) -> Row:
    """Summarise one method; `calls` are those of a group by method."""
    own, plain = calls[method], calls["plain"]
    tau = tau_per_token(call.round_lengths for call in own)
    speedup = median(ratios(plain, own, lambda call: call.seconds_per_token))
    decoding = ratios(plain, own, lambda call: call.decoding_seconds_per_token)
    seconds = sum(call.round_seconds for call in own if "prefill" in call.stage_seconds)
    rounds = sum(call.num_rounds for call in own)
    equal = [call.num_equal_rows for call in own if call.num_equal_rows is not None]
    return Row(
        task=own[0].task,
        batch_size=own[0].num_rows,
        method=method,
        num_items=len({call.item for call in own}),
        num_tokens=sum(call.num_tokens for call in own if call.repeat == 0),
        tau_per_token=tau,
        tau_per_item=tau_per_item(call.round_lengths for call in own),
        rounds_per_second=rounds / seconds if rounds and seconds else None,
        tokens_per_second=sum(call.num_tokens for call in own) / sum(c.seconds for c in own),
        speedup=speedup,
        decoding_speedup=median(decoding) if decoding else None,
        speedup_per_tau=None if tau is None else speedup / tau,
        stage_milliseconds=stage_milliseconds(own),
        peak_mebibytes=peak_mebibytes(own),
        exact_match=sum(equal) / sum(call.num_rows for call in own) if equal else None,
    )


def by_method(calls: Iterable[Call]) -> dict[str, list[Call]]:
    """Group calls by method, plain first."""
    calls = sorted(calls, key=lambda call: call.method != "plain")
    names = dict.fromkeys(call.method for call in calls)
    return {name: [call for call in calls if call.method == name] for name in names}


def tau_per_token(round_lengths: Iterable[Sequence[int]]) -> float | None:
    """Divide the tokens of all rounds by the rounds: long answers weigh more."""
    lengths = [length for call in round_lengths for length in call]
    return fmean(lengths) if lengths else None


def tau_per_item(round_lengths: Iterable[Sequence[int]]) -> float | None:
    """Average the ratios of the answers: every answer weighs the same."""
    taus = [fmean(call) for call in round_lengths if call]
    return fmean(taus) if taus else None


def ratios(plain: Sequence[Call], calls: Sequence[Call], cost: Cost) -> list[float]:
    """Divide plain's cost of each item by the method's, each the median of its repeats."""
    expected, found = cost_by_item(plain, cost), cost_by_item(calls, cost)
    return [expected[item] / found[item] for item in found if item in expected]


def cost_by_item(calls: Sequence[Call], cost: Cost) -> dict[int, float]:
    """Return the median cost of each item over its repeats."""
    items: dict[int, list[float]] = {}
    for call in calls:
        if (value := cost(call)) is not None:
            items.setdefault(call.item, []).append(value)
    return {item: median(values) for item, values in items.items()}


def stage_milliseconds(calls: Sequence[Call]) -> dict[str, float]:
    """Average the time of the prefill in a call, and of each other stage in a round."""
    num_rounds = sum(call.num_rounds for call in calls)
    stages = dict.fromkeys(stage for call in calls for stage in call.stage_seconds)
    counts = {stage: len(calls) if stage == "prefill" else num_rounds for stage in stages}
    return {
        stage: 1000 * sum(call.stage_seconds[stage] for call in calls) / count
        for stage, count in counts.items()
        if count
    }


def peak_mebibytes(calls: Iterable[Call]) -> float | None:
    """Return the highest peak of GPU memory."""
    peaks = [call.peak_bytes / 2**20 for call in calls if call.peak_bytes is not None]
    return max(peaks, default=None)


def accepted_depths(calls: Sequence[Call]) -> list[AcceptedDepth]:
    """Count how deep the rounds of each method accept; one cut short counts by what it emitted."""
    found = []
    for method, own in by_method(calls).items():
        lengths = [length for call in own for length in call.round_lengths]
        # at a depth: the rounds that accepted so many nodes, and emitted one token more
        rounds = [sum(n > depth for n in lengths) for depth in range(max(lengths, default=0))]
        for depth in range(1, len(rounds)):
            shares = rounds[depth] / rounds[0], rounds[depth] / rounds[depth - 1]
            found.append(AcceptedDepth(method, depth, *shares))
    return found
