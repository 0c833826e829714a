"""Llama 4, whose `get_decoder()` is the whole model."""

import math

import pytest
import torch
from conftest import any_target

ROWS = [{"input_ids": [*range(20)], "labels": [*range(20)], "attention_mask": [1] * 20}]


@pytest.mark.xfail(
    strict=True, raises=AttributeError, reason="its features are looked for in its decoder's output"
)
def test_a_llama4_target_that_drafts_can_be_trained_for(trainer_of):
    target = any_target("llama4", torch.float32)
    trainer = trainer_of(ROWS, target=target)
    assert math.isfinite(trainer.train().training_loss)
    ids = torch.arange(1, 6)[None]
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8}
    ours = target.generate(ids, assistant_model=trainer.model.eval(), **given)
    assert ours.equal(target.generate(ids, **given))
