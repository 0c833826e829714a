"""A drafter by its folder, and a pad token set late: what transformers' documentation teaches."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from coral_hf import CoralDrafter
from coral_hf.decoding.generate import named_drafter

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


def test_loading_a_drafter_as_a_language_model_says_what_to_do(folder):
    with pytest.raises((ValueError, TypeError)) as error:
        AutoModelForCausalLM.from_pretrained(folder).generate(PROMPT)
    assert "assistant_model" in str(error.value)


def test_a_pipeline_loads_a_drafter_from_its_folder(folder, target, tokenizer):
    assert said(target, tokenizer, assistant_model=folder) == said(target, tokenizer)


def test_a_pipeline_hands_its_settings_to_the_guard(target, tokenizer):
    drafter = CoralDrafter.from_target(target).eval()
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    drafted = pipeline(
        "text-generation", model=target, tokenizer=tokenizer, assistant_model=drafter
    )
    allowed = {"prefix_allowed_tokens_fn": lambda row, ids: [*range(60 + len(ids) % 3, 90)]}
    for settings in (allowed, {"repetition_penalty": 1.3}):
        assert drafted("Hello", **GIVEN, **settings) == plain("Hello", **GIVEN, **settings)
    for refused in ({"num_beams": 2}, {"use_cache": False}, {"token_healing": True}):
        with pytest.raises(ValueError, match=f"`?{next(iter(refused))}"):
            drafted("Hello", **GIVEN, **refused)


def test_generate_loads_a_drafter_from_its_folder(folder, target):
    given = {"do_sample": False, "max_new_tokens": 8}
    ours = target.generate(PROMPT, assistant_model=folder, **given)
    assert ours.equal(target.generate(PROMPT, **given))


def test_a_pad_token_set_after_the_drafter_was_made_is_no_other_tokenizer(target, tokenizer):
    drafter = CoralDrafter.from_target(target).eval()
    target.config.pad_token_id = tokenizer.eos_token_id  # a line of many scripts
    assert said(target, tokenizer, assistant_model=drafter) == said(target, tokenizer)


GIVEN = {"do_sample": False, "max_new_tokens": 8}


def test_a_drafter_is_loaded_as_an_assistant_is(folder, target):
    drafter = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(drafter, CoralDrafter)
    ours = target.generate(PROMPT, assistant_model=drafter, **GIVEN)
    assert ours.equal(target.generate(PROMPT, **GIVEN))


def test_a_pipeline_loads_target_and_drafter_from_their_folders(folder, target, tmp_path):
    target.save_pretrained(tmp_path / "target")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "target")
    models = {"model": str(tmp_path / "target"), "assistant_model": folder}
    speaker = pipeline("text-generation", **models)
    assert isinstance(speaker.assistant_model, CoralDrafter)
    found = speaker("Hello", **GIVEN)
    assert found == pipeline("text-generation", model=models["model"])("Hello", **GIVEN)


def test_a_drafter_needs_no_tokenizer_beside_it(target, tokenizer, tmp_path):
    CoralDrafter.from_target(target).save_pretrained(tmp_path)
    assert said(target, tokenizer, assistant_model=str(tmp_path)) == said(target, tokenizer)


def test_a_named_drafter_stays_loaded_until_its_folder_changes(folder, target):
    drafter = named_drafter(folder, target)
    assert named_drafter(folder, target) is drafter
    assert drafter.dtype == target.dtype and not drafter.training
    CoralDrafter.from_target(target).save_pretrained(folder)
    assert named_drafter(folder, target) is not drafter


def test_a_name_that_is_no_drafters_is_refused(target, tokenizer, tmp_path):
    target.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="which is no drafter of coral_hf"):
        target.generate(PROMPT, assistant_model=str(tmp_path), **GIVEN)
    with pytest.raises(OSError):
        target.generate(PROMPT, assistant_model=str(tmp_path / "nothing"), **GIVEN)
    # but a pipeline loads a small model by its name
    tokenizer.save_pretrained(tmp_path)
    assert said(target, tokenizer, assistant_model=str(tmp_path)) == said(target, tokenizer)


def test_a_pipeline_takes_the_targets_tokenizer_for_the_drafters(target, tokenizer):
    drafter = CoralDrafter.from_target(target).eval()
    given = {"assistant_model": drafter, "assistant_tokenizer": tokenizer}
    assert said(target, tokenizer, **given) == said(target, tokenizer)
    drafter.config.tokenizer_hash = "of another one"
    with pytest.raises(ValueError, match="maps tokens to other ids"):
        said(target, tokenizer, **given)
