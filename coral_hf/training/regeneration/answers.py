"""Answers of a target to a batch of prompts.

In: prompts as token ids, how to choose tokens. Out: an Answer each. With a temperature a token is
drawn as the largest of log-probability plus Gumbel noise, the noise of each answer from a generator
of its own, so that no answer depends on the others of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ...measure.prompt_batch import left_padded

# instead of what a target's own generation config may hold, which would change its distribution
PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
PLAIN_DRAWS = {"top_k": 0, "min_p": 0.0, "typical_p": 1.0}


class Answer(NamedTuple):
    """What a target said."""

    tokens: list[int]  # (new,) without the mark of the end
    is_complete: bool  # the target ended it itself


@dataclass(frozen=True)
class Speaker:
    """A target and how it chooses tokens."""

    target: PreTrainedModel
    ends: list[int]  # tokens that end an answer
    pad_token_id: int
    max_new_tokens: int
    temperature: float  # 0 is greedy
    top_p: float
    room: int | None  # tokens of a prompt that leave the target positions for an answer
    drafter: PreTrainedModel | None = None

    def answer(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Answer]:
        """Answers to some prompts.

        Args:
            prompts: (batch, length), of different lengths.
            seeds: (batch,) of the draws. With a drafter, the first is that of the batch.
        """
        device = self.target.device
        batch = left_padded(prompts, self.pad_token_id, device)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seeds[0])
            output = self.target.generate(
                **batch,
                generation_config=self._config(),
                logits_processor=self._processors(seeds),
                assistant_model=self.drafter,
            )
        new = output[:, batch["input_ids"].shape[1] :]
        return [self._read(tokens) for tokens in new.tolist()]

    def _config(self) -> GenerationConfig:
        # alone, the target takes the largest score, to which GumbelNoise was added
        drawn = {**PLAIN_DRAWS, "temperature": self.temperature, "top_p": self.top_p}
        is_drawn = self.drafter is not None and self.temperature > 0
        return GenerationConfig(
            **PLAIN,
            **(drawn if is_drawn else {"temperature": 1.0, "top_p": 1.0}),
            do_sample=is_drawn,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.ends or None,
            pad_token_id=self.pad_token_id,
        )

    def _processors(self, seeds: Sequence[int]) -> LogitsProcessorList:
        if self.drafter is not None or self.temperature == 0:
            return LogitsProcessorList()
        return LogitsProcessorList(
            [
                TemperatureLogitsWarper(self.temperature),
                TopPLogitsWarper(self.top_p),
                GumbelNoise(seeds, self.target.device),
            ]
        )

    def _read(self, tokens: list[int]) -> Answer:
        end = next((i for i, token in enumerate(tokens) if token in self.ends), None)
        return Answer(tokens[:end], end is not None)


class GumbelNoise(LogitsProcessor):
    """Noise for which the largest score is a draw from softmax(scores): the Gumbel-max trick.

    Args:
        seeds: (batch,), one a row.
        device: of the scores; another kind of device draws other tokens.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)  # (batch, vocab)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        # the logarithm of an exponential variable is a negative Gumbel variable
        return scores - noise.log()
