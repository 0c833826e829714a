"""Prompts of different lengths end in the same column."""

import pytest
import torch

from coral_hf.measure import left_padded

PROMPTS = [[5, 6, 7], [8]]


@pytest.mark.parametrize("prompts", [PROMPTS, [torch.tensor(ids) for ids in PROMPTS]])
def test_prompts_are_padded_on_the_left(prompts):
    batch = left_padded(prompts, pad_token=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [3, 3, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.long
