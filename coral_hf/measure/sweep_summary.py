"""The numbers of a sweep: a row for each batch size and method, and one for each context.

In: calls. Out: BatchRows and ContextRows. Of a batch whole calls are compared, of a context single
rounds.

    batch of 2, pass    0 (prompts)    1           2           3
    row 0 emits         x0             x1 x2       x3          x4 x5 x6     ends
    row 1 emits         y0             y1          (ended)
    rounds 3, row rounds 3 + 1 = 4, tau = (7 + 2 - 2) / 4 tokens of a row a pass
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from .calls import METHODS, Call

Cost = Callable[[Call], float]


@dataclass(frozen=True)
class BatchRow:
    """One method at one batch size; None where no round was needed."""

    batch_size: int
    method: str
    num_batches: int
    num_tokens: int  # of one call on each batch
    tau: float | None  # tokens of a row for each pass that it took part in
    rounds_per_second: float | None  # without the prompts' pass
    tokens_per_second: float  # of all rows, the prompts' pass included
    speedup: float  # median over batches of plain's seconds per token / the method's
    decoding_speedup: float | None  # the same without the prompts' pass and its tokens
    peak_bytes: int | None
    exact_match: float  # share of rows whose tokens are all plain's


@dataclass(frozen=True)
class ContextRow:
    """A round against a plain token behind one context: medians over repeats, in milliseconds."""

    context: int  # tokens of the prompt
    plain_milliseconds: float  # a token
    draft_milliseconds: float  # a round
    verify_milliseconds: float
    other_milliseconds: float
    prefill_milliseconds: float  # of the drafter's call, once
    plain_prefill_milliseconds: float
    tau: float
    peak_bytes: int | None

    @property
    def round_milliseconds(self) -> float:
        return self.draft_milliseconds + self.verify_milliseconds + self.other_milliseconds

    @property
    def break_even(self) -> float:
        """What a round costs in plain tokens: the tau from which on drafting pays."""
        return self.round_milliseconds / self.plain_milliseconds


def batch_rows(calls: Sequence[Call]) -> list[BatchRow]:
    """By batch size and method."""
    return [
        batch_row(method, [call for call in calls if call.size == size])
        for size in dict.fromkeys(call.size for call in calls)
        for method in METHODS
    ]


def batch_row(method: str, calls: Sequence[Call]) -> BatchRow:
    """`calls`: of one batch size, of both methods."""
    plain, own = calls_of("plain", calls), calls_of(method, calls)
    seconds = sum(call.decoding_seconds for call in own)
    rounds = sum(call.num_rounds for call in own)
    decoding = ratios(plain, own, decoding_seconds_per_token) if rounds else []
    return BatchRow(
        batch_size=own[0].size,
        method=method,
        num_batches=len({call.item for call in own}),
        num_tokens=sum(call.num_tokens for call in own if call.repeat == 0),
        tau=tau(own),
        rounds_per_second=rounds / seconds if rounds else None,
        tokens_per_second=sum(c.num_tokens for c in own) / sum(c.seconds for c in own),
        speedup=median(ratios(plain, own, lambda call: call.seconds / call.num_tokens)),
        decoding_speedup=median(decoding) if decoding else None,
        peak_bytes=peak(own),
        exact_match=sum(c.num_equal_rows for c in own) / sum(c.num_rows for c in own),
    )


def context_rows(calls: Sequence[Call]) -> list[ContextRow]:
    """By context, in the order of the calls."""
    contexts = dict.fromkeys(call.size for call in calls)
    return [context_row([call for call in calls if call.size == size]) for size in contexts]


def context_row(calls: Sequence[Call]) -> ContextRow:
    """`calls`: of one context, of both methods; all have rounds, as no stop ends them."""
    plain, own = calls_of("plain", calls), calls_of("coral", calls)

    def of_a_round(stage: str) -> float:
        return 1000 * median(call.stage_seconds[stage] / call.num_rounds for call in own)

    def of_a_call(some: Iterable[Call]) -> float:
        return 1000 * median(call.stage_seconds["prefill"] for call in some)

    return ContextRow(
        context=own[0].size,
        plain_milliseconds=1000 * median(map(decoding_seconds_per_token, plain)),
        draft_milliseconds=of_a_round("draft"),
        verify_milliseconds=of_a_round("verify"),
        other_milliseconds=of_a_round("other"),
        prefill_milliseconds=of_a_call(own),
        plain_prefill_milliseconds=of_a_call(plain),
        tau=tau(own) or 0.0,
        peak_bytes=peak(own),
    )


def calls_of(method: str, calls: Iterable[Call]) -> list[Call]:
    return [call for call in calls if call.method == method]


def tau(calls: Sequence[Call]) -> float | None:
    """Tokens of a row a round; the prompts' pass and its tokens are left out."""
    row_rounds = sum(call.num_row_rounds for call in calls)
    tokens = sum(call.num_tokens - call.num_rows for call in calls)
    return tokens / row_rounds if row_rounds else None


def decoding_seconds_per_token(call: Call) -> float:
    return call.decoding_seconds / max(call.num_tokens - call.num_rows, 1)


def ratios(plain: Sequence[Call], calls: Sequence[Call], cost: Cost) -> list[float]:
    """For each batch: plain's cost / the method's, each the median of its repeats."""
    items = dict.fromkeys(call.item for call in calls)
    return [
        median(cost(call) for call in plain if call.item == item)
        / median(cost(call) for call in calls if call.item == item)
        for item in items
    ]


def peak(calls: Iterable[Call]) -> int | None:
    return max((call.peak_bytes for call in calls if call.peak_bytes is not None), default=None)
