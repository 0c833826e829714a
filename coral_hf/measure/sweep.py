"""Speed of a drafter against plain `generate`, by batch size and by length of the context.

In: a target, a drafter, prompts, settings. Out: a Report. What grows with the batch is the
work of a pass; what grows with the context is the cache that each pass reads.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..target import text_config
from .benchmark import COLUMNS, LEGEND
from .calls import ROUND_STAGES, Bench, Call, sampling_arguments
from .plots import context_figure, speed_figure
from .prompts import Prompt, encode, left_padded, room_for_prompt
from .report import Report, describe_environment, tabulate
from .settings import SweepSettings
from .summary import grouped, peak_mebibytes, summarise, tau_per_token

logger = logging.getLogger(__name__)

ROUNDS = {"rounds/s": "{0.rounds_per_second:.2f}"}
BATCHES = {"batch size": "{0.batch_size}", **COLUMNS, **ROUNDS}
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
CONTEXT_LEGEND = """\
Medians over repeats, one row, no stop. Break-even: what a round costs in plain tokens, the tau from
which on drafting pays; tau here is that of a prompt joined from many.
"""


def summarise_context(calls: Sequence[Call]) -> dict[str, Any]:
    """Compare a round with a plain token behind one context: medians over repeats, in milliseconds.

    All calls have rounds, as no stop token ends them.
    """
    methods = grouped(calls, "method")
    plain, own = methods["plain"], methods["coral"]

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
        "tau": tau_per_token(own),
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
    rows = [encode(prompt, tokenizer)[0] for prompt in prompts]  # (length,) each
    room = room_for_prompt(target, settings.max_new_tokens)
    for task, batches in list(sized_batches(rows, room, settings)):
        common = greedy | (endless if task == "context" else {})
        methods = {"plain": common, "coral": common | drafting}
        bench = Bench(target, methods, settings.repeats, settings.warmup)
        padded = [left_padded(batch, pad, target.device) for batch in batches]
        bench.warm_up(padded[:1])
        for item, batch in enumerate(padded):
            calls += bench.compare(batch, item, task=task)
        logger.info("%s of %d x %d tokens", task, *padded[0]["input_ids"].shape)
    return sweep_report(settings, describe_environment(target, drafter), calls)


def sweep_report(
    settings: SweepSettings, environment: SimpleNamespace, calls: list[Call]
) -> Report:
    """Tabulate the numbers by batch size and by context; the task of a call says which."""
    tasks = grouped(calls, "task")
    batches = summarise(tasks.get("batch", []), "num_rows")
    of_contexts = grouped(tasks.get("context", []), "prompt_length").values()
    contexts = [summarise_context(own) for own in of_contexts]
    tables, figures = [], dict[str, Callable]()
    if batches:
        tables.append(tabulate("By batch size", BATCHES, batches, LEGEND))
        labels = {"xlabel": "batch size", "ylabel": "tokens/s of all rows"}
        speed = partial(speed_figure, batches, "batch_size", "tokens_per_second", **labels)
        figures["batches"] = speed
    if contexts:
        tables.append(tabulate("By context", CONTEXTS, contexts, CONTEXT_LEGEND))
        figures["contexts"] = partial(context_figure, contexts)
    numbers = {"batches": batches, "contexts": contexts}
    return Report(settings, environment, calls, numbers, tables, figures)


def sized_batches(
    rows: list[Tensor], room: float, settings: SweepSettings
) -> Iterator[tuple[str, list[list[Tensor]]]]:
    """Yield the batches of each size and context, with their task.

    Args:
        rows: ids of each prompt, of shape (length,), as in the batches.
        room: tokens that a prompt may have.
    """
    fitting = [row for row in rows if len(row) <= room]
    for size in settings.batch_sizes:
        if size > len(fitting):
            raise ValueError(
                f"`batch_sizes` has {size}, but {len(fitting)} `prompts` fit the target; give more."
            )
        starts = range(0, len(fitting) - size + 1, size)
        yield "batch", [fitting[start : start + size] for start in starts]
    tokens = torch.cat(rows)
    for length in settings.contexts:
        if length > room:
            raise ValueError(
                f"`contexts` has {length}, but the target leaves room for {room} tokens; give less."
            )
        yield "context", [[tokens.repeat(-(-length // len(tokens)))[:length]]]
