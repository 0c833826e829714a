"""A target whose state cannot drop rejected tokens: that is said before a drafter is trained."""

import logging

import torch
from conftest import any_target

ROWS = [{"input_ids": [*range(20)], "labels": [*range(20)], "attention_mask": [1] * 20}]


def test_what_generate_will_refuse_is_said_before_training(trainer_of, caplog, monkeypatch):
    for name in ("transformers", "coral_hf"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    target = any_target("qwen3_next", torch.float32)
    caplog.clear()
    try:
        trainer_of(ROWS, target=target)
        said = caplog.text
    except ValueError as error:
        said = str(error)
    assert type(target).__name__ in said
