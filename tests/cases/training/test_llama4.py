"""Llama 4, whose `get_decoder()` is the whole model, and which attends within chunks of a row."""

import math

import pytest
import torch
from conftest import WINDOW, any_target

from coral_hf.training.features.reading import TargetFeatures

ROWS = [{"input_ids": [*range(20)], "labels": [*range(20)], "attention_mask": [1] * 20}]


def test_a_llama4_target_that_drafts_can_be_trained_for(trainer_of):
    target = any_target("llama4", torch.float32)
    trainer = trainer_of(ROWS, target=target)
    assert math.isfinite(trainer.train().training_loss)
    ids = torch.arange(1, 6)[None]
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8}
    ours = target.generate(ids, assistant_model=trainer.model.eval(), **given)
    assert ours.equal(target.generate(ids, **given))


@pytest.mark.parametrize("length", [3, 2 * WINDOW + 3])
def test_documents_of_a_packed_row_have_their_own_chunks(length):
    target = any_target("llama4", torch.float64)
    ids = torch.randint(0, target.config.vocab_size, (1, length + 2 * WINDOW))
    positions = torch.cat([torch.arange(length), torch.arange(2 * WINDOW)])[None]
    packed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    found = TargetFeatures(target).read(packed)
    for part in (slice(0, length), slice(length, None)):
        alone = {name: packed[name][:, part] for name in ("input_ids", "attention_mask")}
        expected = TargetFeatures(target).read(alone)
        torch.testing.assert_close(found[:, part], expected, rtol=1e-9, atol=1e-9)
