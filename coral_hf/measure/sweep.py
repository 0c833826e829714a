"""A sweep: plain `generate` against the drafter, by batch size and by length of the context.

In: a target, a drafter, prompts, settings. Out: a SweepReport. The two methods alternate on the
same batch. What grows with the batch is the work of a pass; what grows with the context is the
cache that each pass reads.
"""

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..target import max_positions, text_config
from .calls import Call, Caller
from .environment import describe_environment
from .prompt_batch import left_padded
from .prompts import Prompt, encode
from .sweep_report import SweepReport
from .sweep_settings import SweepSettings

logger = logging.getLogger(__name__)


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
        drafter: a CoralDrafter for it.
        tokenizer: the target's.
        prompts: from `read_prompts`; a batch takes them in their order, left-padded, a context is
            made of their tokens one after the other, repeated where they do not suffice.
    """
    rows = [encode(prompt, tokenizer)[0] for prompt in prompts]
    sweep = Sweep(target, drafter, tokenizer.pad_token_id or 0, settings)
    return SweepReport(
        settings=settings,
        batch_calls=[call for size in settings.batch_sizes for call in sweep.batches(rows, size)],
        context_calls=[call for size in settings.contexts for call in sweep.context(rows, size)],
        environment=describe_environment(target, drafter, None),
    )


class Sweep:
    """What stays the same from size to size."""

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: PreTrainedModel,
        pad_token: int,
        settings: SweepSettings,
    ):
        self.target = target
        self.drafter = drafter
        self.pad_token = pad_token
        self.settings = settings
        text = text_config(target)
        self.vocab_size = text.vocab_size
        context = max_positions(text)
        # tokens of a prompt
        self.room = float("inf") if context is None else context - settings.max_new_tokens

    def batches(self, rows: Sequence[Tensor], size: int) -> Iterator[Call]:
        """Prompts, each (length,), in batches of `size`, each row up to its own end."""
        fitting = [row for row in rows if len(row) <= self.room]
        count = len(fitting) // size
        if count == 0:
            raise ValueError(
                f"`batch_sizes` has {size}, but {len(fitting)} of the {len(rows)} `prompts` fit"
                " the target's context; give more of them, or a smaller batch."
            )
        batches = [fitting[index * size : (index + 1) * size] for index in range(count)]
        yield from self.calls(self.caller(stop_tokens(self.target)), batches, size)
        logger.info("batch size %d: %d batches", size, count)

    def context(self, rows: Sequence[Tensor], length: int) -> Iterator[Call]:
        """One prompt of `length` tokens, answered by as many tokens as the settings ask for."""
        if length > self.room:
            raise ValueError(
                f"`contexts` has {length}, but the target's positions leave room for {self.room}"
                f" tokens before `max_new_tokens` = {self.settings.max_new_tokens}."
            )
        tokens = torch.cat([*rows])
        tokens = tokens.repeat(-(-length // len(tokens)))[:length]
        # the first id behind the vocabulary never comes, so no answer ends early
        yield from self.calls(self.caller([self.vocab_size]), [[tokens]], length)
        logger.info("context of %d tokens", length)

    def caller(self, stops: Sequence[int]) -> Caller:
        arguments = {
            "do_sample": False,
            **dict.fromkeys(("temperature", "top_k", "top_p")),
            "max_new_tokens": self.settings.max_new_tokens,
            "pad_token_id": self.pad_token,
            "eos_token_id": [*stops] or None,
        }
        return Caller(
            self.target,
            self.drafter,
            arguments,
            {"speculation": "always", **self.settings.tree},
            stops,
        )

    def calls(self, caller: Caller, batches: Sequence[list[Tensor]], size: int) -> Iterator[Call]:
        """Both methods on every batch, after a warm-up on the first."""
        padded = [left_padded(rows, self.pad_token, self.target.device) for rows in batches]
        for number in range(self.settings.warmup):
            caller.compare(padded[0], size, 0, number)
        for item, batch in enumerate(padded):
            for repeat in range(self.settings.repeats):
                yield from caller.compare(batch, size, item, repeat)


def stop_tokens(target: PreTrainedModel) -> list[int]:
    """The tokens that end a text of the target's."""
    stops = target.generation_config.eos_token_id
    if stops is None:
        return []
    return [stops] if isinstance(stops, int) else [*stops]
