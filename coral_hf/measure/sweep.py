"""Speed of a drafter against plain `generate`, by batch size and by length of the context.

In: a target, a drafter, prompts, settings. Out: a Report. What grows with the batch is the
work of a pass; what grows with the context is the cache that each pass reads.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..target import max_positions, text_config
from .benchmark import ENDS, SPEED
from .calls import ROUND_STAGES, Bench, Call, sampling_arguments
from .plots import batch_figure, context_figure
from .prompts import Prompt, encode, left_padded
from .report import Environment, Report, describe_environment, tabulate
from .settings import SweepSettings
from .summary import by_method, peak_mebibytes, summarise, tau_per_token

logger = logging.getLogger(__name__)

BATCHES = {
    "batch size": "{0.batch_size}",
    "method": "{0.method}",
    "batches": "{0.num_items}",
    "tokens": "{0.num_tokens}",
    "tau": "{0.tau_per_token:.2f}",
    "rounds/s": "{0.rounds_per_second:.2f}",
    **SPEED,
    **ENDS,
}
CONTEXTS = {
    "context": "{0[context]}",
    "plain, ms a token": "{0[plain_milliseconds]:.2f}",
    "draft + verify + other, ms a round": " + ".join(
        f"{{0[{stage}_milliseconds]:.2f}}" for stage in ROUND_STAGES
    ),
    "round, ms": "{0[round_milliseconds]:.2f}",
    "break-even": "{0[break_even]:.2f}",
    "tau": "{0[tau]:.2f}",
    "prefill, plain, ms": "{0[plain_prefill_milliseconds]:.2f}",
    "prefill, coral, ms": "{0[prefill_milliseconds]:.2f}",
    "GPU peak, MiB": "{0[peak_mebibytes]:.0f}",
}
BATCH_LEGEND = """\
tau: tokens of a row for each target pass that it took part in, the prefill left out. Rounds are
passes of the target over all unfinished rows; rounds/s without the prefill, tokens/s of all rows
with it. Speed-up: seconds per token of plain `generate` on the same batch / of the method, the
median over batches. Exact match: rows whose tokens are all those of plain `generate`.
"""
CONTEXT_LEGEND = """\
Medians over repeats, one row, no stop. Break-even: what a round costs in plain tokens, the tau from
which on drafting pays; tau here is that of a prompt joined from many.
"""


def summarise_context(calls: Sequence[Call]) -> dict[str, Any]:
    """Compare a round with a plain token behind one context: medians over repeats, in milliseconds.

    All calls have rounds, as no stop token ends them.
    """
    plain, own = by_method(calls).values()

    def middle(values: Iterable[float]) -> float:
        return 1000 * median(values)

    token = middle(call.round_seconds / (call.num_tokens - call.num_rows) for call in plain)
    stages = {
        f"{stage}_milliseconds": middle(c.stage_seconds[stage] / c.num_rounds for c in own)
        for stage in ROUND_STAGES
    }
    whole = sum(stages.values())
    return {
        "context": own[0].prompt_length,
        "plain_milliseconds": token,
        **stages,
        "round_milliseconds": whole,
        "break_even": whole / token,
        "tau": tau_per_token(call.round_lengths for call in own),
        "prefill_milliseconds": middle(call.stage_seconds["prefill"] for call in own),
        "plain_prefill_milliseconds": middle(call.stage_seconds["prefill"] for call in plain),
        "peak_mebibytes": peak_mebibytes(own),
    }


def run_sweep(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: SweepSettings,
) -> Report:
    """Measure a drafter at several batch sizes and contexts.

    Args:
        target: a causal language model of transformers, on the device and in the dtype to measure.
        drafter: a drafter for it.
        tokenizer: the target's.
        prompts: from `read_prompts`; a batch takes them in their order, left-padded, a context is
            made of their tokens one after the other, repeated where they do not suffice.

    Raises:
        ValueError: for a batch size without enough prompts, and a context without room.
    """
    pad = tokenizer.pad_token_id or 0
    greedy = sampling_arguments(0.0, settings.max_new_tokens) | {"pad_token_id": pad}
    drafting = {"assistant_model": drafter, "speculation": "always", **settings.drafting()}
    # the first id behind the vocabulary never comes, so it ends no answer early
    endless = {"eos_token_id": [text_config(target).vocab_size]}
    calls: list[Call] = []
    for task, batches in sized_batches(target, tokenizer, prompts, settings):
        common = greedy | (endless if task == "context" else {})
        methods = {"plain": common, "coral": common | drafting}
        bench = Bench(target, methods, settings.repeats, settings.warmup)
        padded = [left_padded(rows, pad, target.device) for rows in batches]
        bench.warm_up(padded[:1])
        for item, batch in enumerate(padded):
            calls += bench.compare(batch, item, task=task)
        logger.info("%s of %d x %d tokens", task, *padded[0]["input_ids"].shape)
    return sweep_report(settings, describe_environment(target, drafter), calls)


def sweep_report(settings: SweepSettings, environment: Environment, calls: list[Call]) -> Report:
    """Tabulate the numbers by batch size and by context; the task of a call says which."""
    of_contexts = [call for call in calls if call.task == "context"]
    batches = summarise([call for call in calls if call.task == "batch"], "num_rows")
    contexts = [
        summarise_context([call for call in of_contexts if call.prompt_length == length])
        for length in dict.fromkeys(call.prompt_length for call in of_contexts)
    ]
    tables = [
        tabulate("By batch size", BATCHES, batches, BATCH_LEGEND),
        tabulate("By context", CONTEXTS, contexts, CONTEXT_LEGEND),
    ]
    numbers: dict[str, list] = {"batches": batches, "contexts": contexts}
    draws: dict[str, Callable] = {"batches": batch_figure, "contexts": context_figure}
    figures = {
        name: partial(draws[name], lines, environment.title)
        for name, lines in numbers.items()
        if lines
    }
    shown = [table for table in tables if table.rows]
    return Report(settings, environment, calls, numbers, shown, figures)


def sized_batches(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: SweepSettings,
) -> list[tuple[str, list[list[Tensor]]]]:
    """Make the batches of each size and context, with their task: ids of shape (length,) each."""
    rows = [encode(prompt, tokenizer)[0] for prompt in prompts]
    room = (max_positions(text_config(target)) or float("inf")) - settings.max_new_tokens
    fitting = [row for row in rows if len(row) <= room]
    found = []
    for size in settings.batch_sizes:
        if size > len(fitting):
            raise ValueError(
                f"`batch_sizes` has {size}, but {len(fitting)} of the {len(rows)} `prompts` fit"
                " the target's context; give more of them, or a smaller batch."
            )
        starts = range(0, len(fitting) - size + 1, size)
        found.append(("batch", [fitting[start : start + size] for start in starts]))
    for length in settings.contexts:
        if length > room:
            raise ValueError(
                f"`contexts` has {length}, but the target's positions leave room for {room}"
                f" tokens before `max_new_tokens` = {settings.max_new_tokens}."
            )
        tokens = torch.cat(rows)
        found.append(("context", [[tokens.repeat(-(-length // len(tokens)))[:length]]]))
    return found
