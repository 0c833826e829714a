"""How many tokens a target pass yields with a drafter, over a set of prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel


def acceptance_length(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompts: Sequence[Tensor],
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int = 0,
) -> float:
    """τ, tokens of a text per pass of the target, after the pass over the prompt.

    Args:
        prompts: token ids, (length,) each.
        temperature: 0 is greedy; else from the whole vocabulary.
    """
    sampling: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"temperature": temperature, "top_p": 1.0, "top_k": 0}
    torch.manual_seed(seed)
    rounds: list[int] = []
    # rows of like length waste little
    ordered = sorted(prompts, key=len)
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        mask = pad_sequence([torch.ones_like(ids) for ids in part], True, 0, "left")
        output = target.generate(
            pad_sequence(part, True, 0, "left").to(target.device),
            attention_mask=mask.to(target.device),
            assistant_model=drafter,
            speculation="always",
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            pad_token_id=drafter.config.pad_token_id or 0,
            do_sample=temperature > 0,
            **sampling,
        )
        rounds += output.stats.round_lengths
    return sum(rounds) / len(rounds)
