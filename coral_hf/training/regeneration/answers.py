"""Answers of a target to a batch of prompts, reproducible row by row.

In: prompts as token ids, settings, a seed for each answer. Out: an Answer each. With a temperature,
a token is drawn as the largest of log-probability plus Gumbel noise; the noise of each answer comes
from a generator of its own, so no answer depends on the others of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ...identity import identify, tokenizer_hash, weights_digest
from ...measure.calls import seeded
from ...measure.chat import chat_options
from ...measure.prompts import left_padded
from ...target import max_positions, text_config
from . import RegenerationSettings

# override the target's own generation config, which would change its distribution
GREEDY = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
GREEDY |= {"do_sample": False, "temperature": 1.0, "top_p": 1.0}
SAMPLED = {**GREEDY, "do_sample": True, "top_k": 0, "min_p": 0.0, "typical_p": 1.0}


class Answer(NamedTuple):
    """The tokens that a target generated after a prompt."""

    tokens: list[int]  # (new,) with the end token, where there is one
    is_complete: bool  # whether the target ended it itself

    @property
    def text_tokens(self) -> list[int]:
        """The tokens of its text, (new,): without the end token."""
        return self.tokens[:-1] if self.is_complete else self.tokens

    @classmethod
    def of(cls, tokens: list[int], ends: Sequence[int]) -> Answer:
        """Cut generated tokens, (new,), after the first end token."""
        end = next((i for i, token in enumerate(tokens, start=1) if token in ends), None)
        return cls(tokens[:end], end is not None)


def end_tokens(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the target's, or where it names none, its tokenizer's.

    `config`: the target's generation config.
    """
    ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def longest_prompt(positions: float, settings: RegenerationSettings) -> float:
    """Return how many tokens of `positions` an answer leaves to its prompt.

    Raises:
        ValueError: if it leaves none.
    """
    if positions <= settings.max_new_tokens:
        raise ValueError(
            f"`max_new_tokens` is {settings.max_new_tokens}, but there are {positions} positions."
        )
    return positions - settings.max_new_tokens


def asked_for(settings: RegenerationSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Collect what answers of any target depend on, as plain values by name."""
    chosen = asdict(settings)
    del chosen["batch_size"]
    return {
        **chosen,
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": tokenizer.chat_template,
        "chat_template_kwargs": chat_options(tokenizer),
    }


@dataclass
class AnswerGenerator:
    """A target that answers batches of prompts.

    Raises:
        ValueError: if answers of `max_new_tokens` leave prompts no room in the target's positions.
    """

    target: PreTrainedModel  # on its device
    tokenizer: PreTrainedTokenizerBase
    settings: RegenerationSettings
    drafter: PreTrainedModel | None = None  # to be faster

    def __post_init__(self) -> None:
        positions = max_positions(text_config(self.target)) or math.inf
        self.max_prompt_length = longest_prompt(positions, self.settings)
        self._ends = end_tokens(self.target.generation_config, self.tokenizer)
        pads = [self.tokenizer.pad_token_id, *self._ends, 0]
        self._pad = next(token for token in pads if token is not None)
        self.target.eval()

    def identity(self) -> dict[str, Any]:
        """Collect what the answers depend on beside their prompts, as plain values by name."""
        digest, dtype, quantization = identify(self.target)
        # a drafter changes no greedy answer
        is_drafted = self.drafter is not None and self.settings.temperature > 0
        return {
            **asked_for(self.settings, self.tokenizer),
            "target": digest,
            "dtype": dtype,
            "quantization": quantization,
            "drafter": weights_digest(self.drafter) if is_drafted else None,
        }

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Answer]:
        """Answer some prompts.

        Args:
            prompts: (batch, length), of different lengths.
            seeds: (batch,) of the draws. With a drafter, the first is that of the whole batch.
        """
        settings, device = self.settings, self.target.device
        temperature, top_p = settings.temperature, settings.top_p
        choice, warpers = GREEDY, list[LogitsProcessor]()
        if temperature > 0 and self.drafter is not None:
            choice = {**SAMPLED, "temperature": temperature, "top_p": top_p}
        elif temperature > 0:  # the largest score, after noise
            warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
            warpers.append(GumbelNoise(seeds, device))
        config = GenerationConfig(
            **choice,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=self._ends or None,
            pad_token_id=self._pad,
        )
        batch = left_padded(prompts, self._pad, device)
        with seeded(seeds[0], device):
            output = self.target.generate(
                **batch,
                generation_config=config,
                logits_processor=LogitsProcessorList(warpers),
                assistant_model=self.drafter,
            )
        new = output[:, batch["input_ids"].shape[1] :]  # (batch, new)
        return [Answer.of(tokens, self._ends) for tokens in new.tolist()]


class GumbelNoise(LogitsProcessor):
    """Noise after which the largest score is a draw from softmax(scores): the Gumbel-max trick.

    Args:
        seeds: (batch,), one a row.
        device: of the scores; another kind of device draws other tokens.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        # a generator for each row of scores (batch, vocab)
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add noise to scores, (batch, vocab)."""
        noise = torch.empty_like(scores)  # (batch, vocab)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        # the logarithm of an exponential variable is a negative Gumbel variable
        return scores - noise.log()
