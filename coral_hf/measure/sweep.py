"""The sweep: plain `generate` against the drafter, by batch size and by length of the context.

In: a target, a drafter, prompts, settings. Out: a SweepReport. What grows with the batch is the
work of a pass; what grows with the context is the cache that each pass reads.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..target import max_positions, text_config
from . import plots
from .benchmark import ENDS, SPEED
from .calls import Bench, Call, sampling_arguments
from .prompts import Prompt, encode, left_padded
from .report import Report, Table, describe_environment, tabulate
from .settings import SweepSettings
from .summary import Row, by_method, cost_by_item, peak_mebibytes, summarise, tau_per_token

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

BATCHES = {
    "batch size": "{0.group}",
    "method": "{0.method}",
    "batches": "{0.num_items}",
    "tokens": "{0.num_tokens}",
    "tau": "{0.tau_per_token:.2f}",
    "rounds/s": "{0.rounds_per_second:.2f}",
    **SPEED,
    **ENDS,
}
CONTEXTS = {
    "context": "{0.context}",
    "plain, ms a token": "{0.plain_milliseconds:.2f}",
    "draft + verify + other, ms a round": "{0.draft_milliseconds:.2f} + {0.verify_milliseconds:.2f}"
    " + {0.other_milliseconds:.2f}",
    "round, ms": "{0.round_milliseconds:.2f}",
    "break-even": "{0.break_even:.2f}",
    "tau": "{0.tau:.2f}",
    "prefill, plain, ms": "{0.plain_prefill_milliseconds:.2f}",
    "prefill, coral, ms": "{0.prefill_milliseconds:.2f}",
    "GPU peak, MiB": "{0.peak_mebibytes:.0f}",
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


@dataclass(frozen=True)
class ContextRow:
    """A round against a plain token behind one context: medians over repeats, in milliseconds."""

    context: int  # tokens of the prompt
    plain_milliseconds: float  # a token
    draft_milliseconds: float  # a round
    verify_milliseconds: float
    other_milliseconds: float
    round_milliseconds: float
    break_even: float  # a round in plain tokens: the tau from which on drafting pays
    tau: float | None
    prefill_milliseconds: float  # of the drafter's call
    plain_prefill_milliseconds: float
    peak_mebibytes: float | None  # of GPU memory


@dataclass(frozen=True, kw_only=True)
class SweepReport(Report):
    """The result of `run_sweep`; the task of its calls is "batch" or "context"."""

    @cached_property
    def batches(self) -> list[Row]:
        """The numbers by batch size and method."""
        calls = [call for call in self.calls if call.task == "batch"]
        return summarise(calls, lambda call: call.num_rows)

    @cached_property
    def contexts(self) -> list[ContextRow]:
        """The numbers by length of the context."""
        return summarise_contexts([call for call in self.calls if call.task == "context"])

    @property
    def tables(self) -> list[Table]:
        """The tables of what was swept."""
        found = []
        if self.batches:
            found.append(tabulate("By batch size", BATCHES, self.batches, BATCH_LEGEND))
        if self.contexts:
            found.append(tabulate("By context", CONTEXTS, self.contexts, CONTEXT_LEGEND))
        return found

    def numbers(self) -> dict[str, Any]:
        """The rows of both axes."""
        return {
            "batches": [row.to_dict("batch_size") for row in self.batches],
            "contexts": [asdict(row) for row in self.contexts],
        }

    def figures(self) -> dict[str, "Figure"]:
        """The plots `batches` and `contexts`, of what was swept."""
        found = {}
        if self.batches:
            found["batches"] = plots.batch_figure(self.batches, self.title)
        if self.contexts:
            stages = {
                stage: {row.context: vars(row)[f"{stage}_milliseconds"] for row in self.contexts}
                for stage in ("draft", "verify", "other")
            }
            plain = {row.context: row.plain_milliseconds for row in self.contexts}
            labels = {"title": self.title, "xlabel": "context, tokens", "ylabel": "ms a round"}
            found["contexts"] = plots.stack_figure(stages, plain, **labels)
        return found


def summarise_contexts(calls: Sequence[Call]) -> list[ContextRow]:
    """Rows by context, in the order of the calls, each of both methods."""
    contexts = dict.fromkeys(call.prompt_length for call in calls)
    return [
        summarise_context(by_method(call for call in calls if call.prompt_length == context))
        for context in contexts
    ]


def summarise_context(calls: dict[str, list[Call]]) -> ContextRow:
    """The row of one context; all calls have rounds, as no stop ends them."""
    plain, own = calls["plain"], calls["coral"]

    def per_round(stage: str) -> float:
        return 1000 * median(call.stage_seconds[stage] / call.num_rounds for call in own)

    token = 1000 * median(cost_by_item(plain, lambda c: c.decoding_seconds_per_token).values())
    stages = {f"{name}_milliseconds": per_round(name) for name in ("draft", "verify", "other")}
    return ContextRow(
        context=own[0].prompt_length,
        plain_milliseconds=token,
        **stages,
        round_milliseconds=sum(stages.values()),
        break_even=sum(stages.values()) / token,
        tau=tau_per_token(call.round_lengths for call in own),
        prefill_milliseconds=1000 * median(call.stage_seconds["prefill"] for call in own),
        plain_prefill_milliseconds=1000 * median(call.stage_seconds["prefill"] for call in plain),
        peak_mebibytes=peak_mebibytes(own),
    )


def run_sweep(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: SweepSettings,
) -> SweepReport:
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
    stops: dict[str, dict] = {"batch": {}, "context": endless}
    benches = {
        task: Bench(
            target,
            {"plain": greedy | own, "coral": greedy | own | drafting},
            settings.repeats,
            settings.warmup,
        )
        for task, own in stops.items()
    }
    calls: list[Call] = []
    for task, batches in sized_batches(target, tokenizer, prompts, settings):
        padded = [left_padded(rows, pad, target.device) for rows in batches]
        benches[task].warm_up(padded[:1])
        for item, batch in enumerate(padded):
            calls += benches[task].compare(batch, item, task=task)
        logger.info("%s of %d x %d tokens", task, *padded[0]["input_ids"].shape)
    environment = describe_environment(target, drafter)
    return SweepReport(settings=settings, environment=environment, calls=calls)


def sized_batches(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: SweepSettings,
) -> list[tuple[str, list[list[Tensor]]]]:
    """The batches of each size and context, rows (length,), with the task that they are for."""
    rows = [encode(prompt, tokenizer)[0] for prompt in prompts]
    room = (max_positions(text_config(target)) or float("inf")) - settings.max_new_tokens
    fitting = [row for row in rows if len(row) <= room]
    found = []
    for size in settings.batch_sizes:
        count = len(fitting) // size
        if count == 0:
            raise ValueError(
                f"`batch_sizes` has {size}, but {len(fitting)} of the {len(rows)} `prompts` fit"
                " the target's context; give more of them, or a smaller batch."
            )
        batches = [fitting[index * size : (index + 1) * size] for index in range(count)]
        found.append(("batch", batches))
    for length in settings.contexts:
        if length > room:
            raise ValueError(
                f"`contexts` has {length}, but the target's positions leave room for {room}"
                f" tokens before `max_new_tokens` = {settings.max_new_tokens}."
            )
        tokens = torch.cat(rows)
        found.append(("context", [[tokens.repeat(-(-length // len(tokens)))[:length]]]))
    return found
