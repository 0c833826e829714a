"""Prompts answered by the target with the drafter, for the rounds that it takes.

In: token ids of prompts. Out: the tokens that each round of the tree decoding of `generate` emits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...drafters.coral.modeling import CoralDrafter
from ...measure.prompt_batch import left_padded
from ...target import Target, tree_obstacle


class AnswerSettings(NamedTuple):
    """How prompts are answered."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy; else from the whole vocabulary
    batch_size: int = 8
    seed: int = 0


def decoded_rounds(
    drafter: CoralDrafter, target: Target, prompts: Sequence[list[int]], answers: AnswerSettings
) -> list[int]:
    """Tokens that each round emits when the target answers prompts with the drafter."""
    # where no tree can be told to the target, rows of a batch wait for each other
    size = answers.batch_size if tree_obstacle(target.model) is None else 1
    pad = drafter.config.pad_token_id or 0
    torch.manual_seed(answers.seed)
    rounds: list[int] = []
    for start in range(0, len(prompts), size):
        batch = left_padded(prompts[start : start + size], pad, target.device)
        output = target.model.generate(
            **batch,
            assistant_model=drafter,
            speculation="always",
            return_dict_in_generate=True,
            max_new_tokens=answers.max_new_tokens,
            pad_token_id=pad,
            **_sampling(answers.temperature),
        )
        rounds += output.stats.round_lengths
    return rounds


def _sampling(temperature: float) -> dict[str, Any]:
    """Arguments of `generate`, so that no default of the target's slips in."""
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
