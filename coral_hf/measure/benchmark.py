"""Benchmark of drafters: every method on every prompt in turn, compared with the target alone.

In: a target, a drafter, prompts, settings. Out: a Report. "plain" is the target alone, "coral" our
drafter; "prompt_lookup" and "assisted" are transformers' own, the latter with a small model of the
target's vocabulary.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, zip_longest
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decoding import warm_up
from .calls import Arguments, Bench, Call, sampling_arguments
from .prompts import Prompt, encode, fitting, left_padded, room_for_prompt
from .report import Report, bar_figure, describe_environment, tabulate
from .settings import BenchmarkSettings
from .summary import accepted_depths, summarise_tasks

logger = logging.getLogger(__name__)

COLUMNS = {
    "method": "{0.method}",
    "items": "{0.num_items}",
    "tokens": "{0.num_tokens}",
    "tau / token": "{0.tau_per_token:.2f}",
    "tau / item": "{0.tau_per_item:.2f}",
    "tokens/s": "{0.tokens_per_second:.1f}",
    "speed-up": "{0.speedup:.2f}x",
    "decoding alone": "{0.decoding_speedup:.2f}",
    "speed-up / tau": "{0.speedup_per_tau:.2f}",
    "draft + verify + other, ms a round": "{0.round_stages}",
    "GPU peak, MiB": "{0.peak_mebibytes:.0f}",
    "exact match": "{0.exact_match:.1%}",
}
DEPTHS = {
    "method": "{0.method}",
    "depth": "{0.depth}",
    "accepted, of all rounds": "{0.share:.1%}",
    "accepted, where the parent was": "{0.share_given_parent:.1%}",
}
MISMATCHES = {
    "task": "{0.task}",
    "prompt": "{0.prompt}",
    "turn": "{0.turn}",
    "method": "{0.method}",
    "first difference at": "{0.position}",
    "top-2 logit gap there": "{0.top2_gap:.3g}",
}
LOOKUP_TOKENS = 10  # of the longest draft
TINY = torch.finfo(torch.float64).tiny
TIE = 1e-6  # gap of the two best logits in float64, below which they are in no order
ROUNDINGS = 64  # of another dtype, within which two logits count as equal
LEGEND = """\
Items are turns of prompts, or batches; tokens: new ones of a call on each. Tau: tokens of a row for
each target pass that it took part in after the first, the prefill; by token (all tokens / all
passes) and by item (mean of the items' ratios). Rounds: passes over all unfinished rows. Speed-up:
seconds per token of plain `generate` / of the method, prefill included, the median over items.
Speed-up / tau: what drafting and wider passes leave of tau. Exact match: answers whose tokens are
all those of plain `generate`; a gap of about the dtype's rounding is a tie that fell the other way.
"""


@dataclass(frozen=True)
class Mismatch:
    """The first place where a method's greedy tokens differ from those of the target alone.

    A pass over several tokens rounds differently from one token at a time, so a near tie (a top-2
    gap of some ulps of the dtype) may flip; a wide gap is a bug.
    """

    task: str
    prompt: str
    turn: int
    method: str
    position: int  # among the new tokens
    top2_gap: float  # between the target's two highest logits there, in its own dtype
    num_roundings: float = 0.0  # the gap by what the dtype rounds the highest logit by

    def is_tie(self, dtype: str) -> bool:
        """Whether the two logits were too close to be told apart in a dtype."""
        return self.top2_gap <= TIE if dtype == "float64" else self.num_roundings <= ROUNDINGS


def run_benchmark(
    target: PreTrainedModel,
    drafter: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: BenchmarkSettings | None = None,
    assistant: PreTrainedModel | None = None,
) -> Report:
    """Measure a drafter, and the other methods that the settings name, against plain `generate`.

    Args:
        target: a causal language model of transformers, on the device and in the dtype to measure.
        drafter: a drafter for it; None where "coral" is not among the methods.
        tokenizer: the target's.
        prompts: from `read_prompts`; those too long for the target's context are only listed.
        settings: the defaults where None.
        assistant: a small model with the target's vocabulary, for "assisted".

    Raises:
        ValueError: for a method without its drafter, and if no prompt fits the target's context.
    """
    settings = settings or BenchmarkSettings()
    drafting = {"speculation": settings.speculation, **settings.drafting()}
    own: dict[str, Arguments] = {
        "plain": {},
        "coral": {"assistant_model": drafter, **drafting},
        "prompt_lookup": {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
        "assisted": {"assistant_model": assistant},
    }
    common = sampling_arguments(settings.temperature, settings.max_new_tokens)
    methods: dict[str, Arguments] = {}
    for name in settings.methods:
        if None in own[name].values():
            argument = "drafter" if name == "coral" else "assistant"
            raise ValueError(f"`methods` has {name!r}, but `{argument}` is None; pass a model.")
        methods[name] = common | own[name]
    bench = Bench(target, methods, settings.repeats, settings.warmup, settings.seed)
    seconds = None
    if settings.compile and "coral" in settings.methods:
        seconds = compile_ahead(bench, {encode(one, tokenizer).shape[1] for one in prompts})
    measured = measure_prompts(bench, tokenizer, prompts, settings.max_turns)
    environment = describe_environment(target, drafter, assistant)
    environment.compile_seconds = seconds
    return benchmark_report(settings, environment, *measured)


def compile_ahead(bench: Bench, lengths: Iterable[int]) -> float:
    """Compile what calls of "coral" run, so that no timed one does; returns the seconds.

    `lengths`: of prompts, in tokens.
    """
    own = {**bench.methods["coral"]}
    drafter, new = own.pop("assistant_model"), own.pop("max_new_tokens")
    return sum(warm_up(bench.target, drafter, max_length=length + new, **own) for length in lengths)


def benchmark_report(
    settings: BenchmarkSettings,
    environment: SimpleNamespace,
    calls: list[Call],
    mismatches: Sequence[Mismatch] = (),
    skipped: Sequence[str] = (),
) -> Report:
    """Tabulate results by task and method, acceptance by depth, and other tables with a line."""
    rows, depths = summarise_tasks(calls), accepted_depths(calls)
    tables = [
        tabulate("Results", {"task": "{0.task}", **COLUMNS}, rows, LEGEND),
        tabulate("Acceptance by depth", DEPTHS, depths),
        tabulate("Answers that differ from the target's own", MISMATCHES, mismatches),
        tabulate("Longer than the target's context", {"prompt": "{0}"}, skipped),
    ]
    numbers = {"rows": rows, "acceptance": depths, "mismatches": mismatches, "skipped": skipped}
    figures: dict[str, Callable] = {
        "acceptance": partial(bar_figure, depths, "depth", "share", ylabel="rounds that accept"),
        "speedup": partial(bar_figure, rows, "task", "speedup", ylabel="speed-up, median"),
    }
    shown = [table for table in tables if table.rows]
    return Report(settings, environment, calls, numbers, shown, figures)


def measure_prompts(
    bench: Bench, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_turns: int = 1
) -> tuple[list[Call], list[Mismatch], list[str]]:
    """Call every method of a bench on every prompt in turn.

    Returns:
        the calls, the differences from "plain", and task/id of prompts beyond the target's context.

    Raises:
        ValueError: if no prompt fits the target's context.
    """
    target, max_new_tokens = bench.target, bench.methods["plain"]["max_new_tokens"]
    room = room_for_prompt(target, max_new_tokens)

    def ids_of(prompt: Prompt) -> Tensor:  # (1, length)
        return encode(prompt, tokenizer).to(target.device)

    kept = fitting(prompts, tokenizer, target, max_new_tokens)
    skipped = [f"{prompt.task}/{prompt.id}" for prompt in prompts if prompt not in kept]
    bench.warm_up([left_padded(ids_of(prompt), 0) for prompt in kept[: bench.warmup]])
    measured: list[Call] = []
    mismatches: list[Mismatch] = []
    items = count()
    for number, start in enumerate(kept, start=1):
        prompt = start
        for turn in range(max_turns):
            ids = ids_of(prompt)
            if ids.shape[1] > room:
                break
            labels = {"task": prompt.task, "prompt": prompt.id, "turn": turn}
            calls = bench.compare(left_padded(ids, 0), next(items), **labels)
            plain = next(call.tokens[0] for call in calls if call.method == "plain")
            measured += calls
            mismatches += mismatches_of(target, ids, plain, calls)
            if not prompt.turns:
                break
            prompt = prompt.follow_up(tokenizer.decode(plain, skip_special_tokens=True))
        logger.info("%d of %d prompts: %s %s", number, len(kept), start.task, start.id)
    return measured, mismatches, skipped


def mismatches_of(
    target: PreTrainedModel, ids: Tensor, expected: list[int], calls: Sequence[Call]
) -> Iterator[Mismatch]:
    """Yield each method's first difference from "plain", in its first repeat; none if sampled.

    Args:
        ids: (1, length), the prompt.
    """
    for call in calls:
        if call.repeat == 0 and not call.temperature:
            position = first_difference(expected, call.tokens[0])
            if position is not None:
                best, second = top2_logits(target, ids, expected[:position])
                rounding = max(abs(best) * torch.finfo(target.dtype).eps, TINY)
                labels = (call.task, call.prompt, call.turn, call.method)
                yield Mismatch(*labels, position, best - second, (best - second) / rounding)


def first_difference(expected: list[int], found: list[int]) -> int | None:
    """Return the index of the first token that differs or that only one has, None if equal."""
    pairs = enumerate(zip_longest(expected, found))
    return next((index for index, (one, other) in pairs if one != other), None)


def num_same(expected: list[int], found: list[int]) -> int:
    """Count the expected tokens before the first that differs."""
    place = first_difference(expected, found)
    return len(expected) if place is None else place


@torch.no_grad()
def top2_logits(target: PreTrainedModel, ids: Tensor, tokens: list[int]) -> tuple[float, float]:
    """Return the top two logits after a prompt (1, length) and tokens that both answers share."""
    shared = torch.cat([ids, ids.new_tensor([tokens], dtype=ids.dtype)], dim=1)
    logits = target(input_ids=shared, use_cache=False).logits[0, -1]  # (vocab,)
    best, second = logits.double().topk(2).values.tolist()
    return best, second
