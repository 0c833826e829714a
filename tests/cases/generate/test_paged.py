"""Continuous batching, which takes no assistant."""

import pytest
import torch
from conftest import tiny_target
from transformers import GenerationMixin

import coral_hf
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


@pytest.mark.parametrize("how", ["drafter", "folder"])
def test_continuous_batching_is_refused_with_a_drafter(monkeypatch, tmp_path, how):
    target = tiny_target("llama", torch.float32)
    drafter = CoralDrafter.from_target(target).eval()
    drafter.save_pretrained(tmp_path)
    given = {
        "drafter": {"assistant_model": drafter},
        "folder": {"assistant_model": str(tmp_path)},
    }[how]
    with pytest.raises(ValueError, match="^`generate_batch` is continuous batching, .*; call `gen"):
        target.generate_batch([[3, 4, 5]], max_new_tokens=4, **given)
    plain = GenerationMixin.generate_batch.__wrapped__
    coral_hf.uninstall()
    try:
        assert GenerationMixin.generate_batch is plain
    finally:
        coral_hf.install()
    assert target.generate_batch([]) == {}  # without a drafter, it is transformers' own


def test_the_doors_of_generation_are_those_that_are_known():
    doors = {name for name in dir(GenerationMixin) if "generate" in name and name[0] != "_"}
    assert doors == {"generate", "generate_batch", "load_custom_generate"}
