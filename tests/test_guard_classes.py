"""Classes of transformers in the guard: known ones, refused ones, and new ones, which are tried."""

import pytest
import torch
from conftest import SIZES, VOCAB, make_target, tiny_target
from tiny_models import tiny_model
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from coral_hf import CoralDrafter
from coral_hf.decoding.guard import CHAIN, REFUSED, TREE, judge_target
from coral_hf.decoding.guard.entries import TABLES
from coral_hf.decoding.guard.foreign import KNOWN_CLASSES
from coral_hf.target import decoder_of

REFUSED_CLASSES = TABLES["Classes of transformers"]
# they lack what `generate` needs: a number of layers, or `generate` of transformers
LACKING = {"BltForCausalLM", "DiffusionGemmaForBlockDiffusion"}
WITHOUT = sorted({*REFUSED_CLASSES, *LACKING})


def target_of(name: str) -> PreTrainedModel:
    """A tiny target of a class by its name, which older versions of transformers may lack."""
    # by the names in the mappings: going through what they hold imports all classes
    pairs = [
        (auto_class, model_type)
        for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText)
        for model_type, own in auto_class._model_mapping._model_mapping.items()
        if own == name
    ]
    if not pairs:
        pytest.skip(f"no {name} in this version of transformers")
    auto_class, model_type = pairs[0]
    try:
        return tiny_model(CONFIG_MAPPING[model_type], auto_class)
    except ValueError:
        pytest.skip(f"no tiny {name} in this version of transformers")


@pytest.mark.parametrize("name", WITHOUT)
def test_a_class_that_no_drafter_can_follow_is_refused(name):
    target, foreign = target_of(name), CoralDrafter.from_target(tiny_target("llama"))
    with pytest.raises(ValueError, match=f"{name} cannot take a drafter"):
        CoralDrafter.from_target(target)
    if name not in LACKING:
        ids = torch.tensor([[5, 6, 7]])
        with pytest.raises(ValueError, match="cannot take a drafter"):
            target.generate(ids, max_new_tokens=8, assistant_model=foreign)


def test_the_decoder_of_a_target_is_no_lm_head_of_that_name():
    target = target_of("ModernBertDecoderForCausalLM")
    assert isinstance(target.decoder, torch.nn.Linear)
    assert decoder_of(target) is target.base_model


def test_known_classes_are_in_order():
    assert not KNOWN_CLASSES & REFUSED_CLASSES.keys()
    assert len(KNOWN_CLASSES) > 150


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("LlamaForCausalLM", TREE),
        ("BartForCausalLM", CHAIN),
        ("ProphetNetForCausalLM", REFUSED),
        ("CpmAntForCausalLM", REFUSED),
    ],
)
def test_a_class_that_is_not_known_is_tried(name, way, monkeypatch):
    monkeypatch.setattr("coral_hf.decoding.guard.foreign.KNOWN_CLASSES", frozenset())
    monkeypatch.setitem(TABLES, "Classes of transformers", {})
    judgement = judge_target(target_of(name))
    assert judgement.way == way
    assert way != REFUSED or "was tried on a small copy" in judgement.reasons[0]


def test_a_text_beyond_the_best_keys_is_refused():
    keys = 12
    fields = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
    target = make_target(AutoConfig.for_model("doge", **fields, keep_window_size=keys))
    drafter = CoralDrafter.from_target(target).eval()
    ids = torch.arange(6)[None] % VOCAB
    call = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    plain = target.generate(ids, max_new_tokens=6, **call)
    assert target.generate(ids, max_new_tokens=6, assistant_model=drafter, **call).equal(plain)
    with pytest.raises(ValueError, match="13 tokens, but `keep_window_size` is 12"):
        target.generate(ids, max_new_tokens=7, assistant_model=drafter, **call)


def own_update(target):
    target._update_model_kwargs_for_generation = lambda *args, **kwargs: {}


CHANGES = {
    "attention": lambda target: target.set_attn_implementation("flex_attention"),
    "rotary, in its place": lambda target: target.config.rope_parameters.update(rope_type="spiral"),
    "layer types": lambda target: vars(target.config).update(
        layer_types=["chunked_attention"] * 2, attention_chunk_size=8
    ),
    "module": lambda target: setattr(target.model.layers[1], "mlp", OfOthers()),
    "forward": lambda target: setattr(
        target.model.layers[1].mlp, "forward", lambda x: x.roll(1, 1)
    ),
    "hook": lambda target: target.lm_head.register_forward_hook(lambda _, __, out: out.roll(1, 1)),
    "method": own_update,
    "head": lambda target: setattr(target, "lm_head", None),
    "quantization": lambda target: setattr(
        target.config, "quantization_config", {"quant_method": "of_others"}
    ),
}


class OfOthers(torch.nn.Module):
    """A module that looks at the token before."""

    def forward(self, states):
        return states.roll(1, dims=1)


@pytest.mark.parametrize("change", CHANGES)
def test_a_target_that_has_changed_between_two_calls_is_judged_anew(change):
    target = tiny_target("llama")
    assert judge_target(target, 1).way == TREE
    CHANGES[change](target)
    assert judge_target(target, 1).way < TREE
