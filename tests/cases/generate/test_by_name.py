"""A drafter by its folder, and a pad token set late: what transformers' documentation teaches."""

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from coral_hf import CoralDrafter

PROMPT = torch.tensor([[0, 70, 71]])


@pytest.fixture
def folder(target, tokenizer, tmp_path):
    """A drafter's folder, with the target's tokenizer in it."""
    CoralDrafter.from_target(target).save_pretrained(tmp_path / "drafter")
    tokenizer.save_pretrained(tmp_path / "drafter")
    return str(tmp_path / "drafter")


def said(target, tokenizer, **assistant) -> str:
    speaker = pipeline("text-generation", model=target, tokenizer=tokenizer, **assistant)
    return speaker("Hello", max_new_tokens=8, do_sample=False)[0]["generated_text"]


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="the error lists the models of transformers"
)
def test_loading_a_drafter_as_a_language_model_says_what_to_do(folder):
    with pytest.raises((ValueError, TypeError)) as error:
        AutoModelForCausalLM.from_pretrained(folder).generate(PROMPT)
    assert "assistant_model" in str(error.value)


@pytest.mark.xfail(strict=True, raises=ValueError, reason="it finds no class to load")
def test_a_pipeline_loads_a_drafter_from_its_folder(folder, target, tokenizer):
    assert said(target, tokenizer, assistant_model=folder) == said(target, tokenizer)


@pytest.mark.xfail(strict=True, raises=AttributeError, reason="a str is taken for a model")
def test_generate_loads_a_drafter_from_its_folder(folder, target):
    given = {"do_sample": False, "max_new_tokens": 8}
    ours = target.generate(PROMPT, assistant_model=folder, **given)
    assert ours.equal(target.generate(PROMPT, **given))


@pytest.mark.xfail(strict=True, raises=ValueError, reason="it is taken for another tokenizer")
def test_a_pad_token_set_after_the_drafter_was_made_is_no_other_tokenizer(target, tokenizer):
    drafter = CoralDrafter.from_target(target).eval()
    target.config.pad_token_id = tokenizer.eos_token_id  # a line of many scripts
    assert said(target, tokenizer, assistant_model=drafter) == said(target, tokenizer)
