"""Speed of a drafter against plain `generate`, by batch size and by length of the context.

    python examples/sweep.py --target org/my-llama --drafter my-drafter --prompts mt_bench.jsonl \\
        --output sweep --batch-size 1 --batch-size 8 --context 1024 --context 4096

A table with a line a size. What grows with the batch is the work of a pass; what grows with the
context is the cache that each pass reads.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coral_hf.cli.options import MeasuredOptions
from coral_hf.cli.parser import parse
from coral_hf.measure.benchmark import COLUMNS, LEGEND
from coral_hf.measure.calls import Bench, Call, sampling_arguments
from coral_hf.measure.prompts import Prompt, encode, left_padded, room_for_prompt
from coral_hf.measure.report import Report, bar_figure, describe_environment, tabulate
from coral_hf.measure.settings import DraftingSettings, option
from coral_hf.measure.summary import Row, summarise
from coral_hf.target import text_config

logger = logging.getLogger(__name__)

CONTEXT = "context"
SIZES = {
    "size": "{0.task}",
    **COLUMNS,
    "break-even": "{0.break_even:.2f}",
}
BREAK_EVEN = """\
Break-even: what a round costs in plain tokens, the tau from which on drafting pays. No stop ends an
answer after a context, whose prompt is joined from many.
"""


class Size(Row):
    """The numbers of one method at one size."""

    @property
    def break_even(self) -> float | None:
        """What a round costs in plain tokens."""
        tau, speedup = self.tau_per_token, self.decoding_speedup
        return tau / speedup if tau and speedup else None


@dataclass(kw_only=True)
class SweepSettings(DraftingSettings):
    """What a sweep varies, and how often each size is measured; decoding is greedy."""

    batch_sizes: list[int] = option("Prompts in a batch.", [], flag="batch-size", least=1)
    contexts: list[int] = option("Tokens before the answer.", [], flag="context", least=1)
    # the first token comes with the prefill
    max_new_tokens: int = option("Tokens of each answer.", 128, least=2)
    repeats: int = option("Timed calls of each method on each batch.", 3, least=1)
    warmup: int = option("Untimed calls of each method before those of each size.", 1, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batch_sizes and not self.contexts:
            raise ValueError("`batch_sizes` and `contexts` are both empty; give one of them.")


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
        common = greedy | (endless if task.startswith(CONTEXT) else {})
        methods = {"plain": common, "coral": common | drafting}
        bench = Bench(target, methods, settings.repeats, settings.warmup)
        padded = [left_padded(batch, pad, target.device) for batch in batches]
        bench.warm_up(padded[:1])
        for item, batch in enumerate(padded):
            calls += bench.compare(batch, item, task=task)
        logger.info("%s: %d x %d tokens", task, *padded[0]["input_ids"].shape)
    sizes = [Size(**vars(row)) for row in summarise(calls, "task")]
    label = "tokens/s of all rows"
    figure = partial(bar_figure, sizes, "task", "tokens_per_second", ylabel=label)
    table = tabulate("Results", SIZES, sizes, LEGEND + BREAK_EVEN)
    environment = describe_environment(target, drafter)
    return Report(settings, environment, calls, {"rows": sizes}, [table], {"speed": figure})


def sized_batches(
    rows: list[Tensor], room: float, settings: SweepSettings
) -> Iterator[tuple[str, list[list[Tensor]]]]:
    """Yield the batches of each size and context, with its name.

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
        yield f"batch of {size}", [fitting[start : start + size] for start in starts]
    tokens = torch.cat(rows)
    for length in settings.contexts:
        if length > room:
            raise ValueError(
                f"`contexts` has {length}, but the target leaves room for {room} tokens; give less."
            )
        yield f"{CONTEXT} of {length}", [[tokens.repeat(-(-length // len(tokens)))[:length]]]


def sweep(own: MeasuredOptions, settings: SweepSettings) -> None:
    """Measure a drafter by batch size and by length of the context."""
    own.show(run_sweep(*own.load(), settings))


if __name__ == "__main__":
    sweep(**parse("sweep.py", sweep, sys.argv[1:]))
