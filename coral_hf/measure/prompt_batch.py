"""Prompts of different lengths as one batch for `generate`.

In: token ids. Out: `input_ids` and `attention_mask`, padded on the left, since text goes on at the
right end.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def left_padded(
    prompts: Sequence[Sequence[int] | Tensor],
    pad_token: int,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (batch, longest) of prompts, each (length,)."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt)
        ids[row, start:] = torch.as_tensor(prompt)
        mask[row, start:] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
