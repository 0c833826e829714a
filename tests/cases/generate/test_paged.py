"""Continuous batching, which takes no assistant."""

import pytest
import torch
from conftest import tiny_target

from coral_hf import CoralDrafter


def test_a_paged_cache_is_refused_with_a_drafter(monkeypatch):
    target = tiny_target("llama", torch.float32)
    drafter, ids = CoralDrafter.from_target(target).eval(), torch.randint(3, 40, (1, 9))
    # where such a call goes; it would take seconds
    monkeypatch.setattr(
        target, "generate_batch", lambda *_, **__: pytest.fail("it decodes without the drafter")
    )
    with pytest.raises((ValueError, NotImplementedError), match="paged|continuous batching"):
        target.generate(
            ids,
            do_sample=False,
            max_new_tokens=4,
            cache_implementation="paged",
            assistant_model=drafter,
        )
