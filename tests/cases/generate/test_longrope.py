"""Rotary embeddings that change with the length of the text: LongRoPE and dynamic NTK."""

import pytest
import torch
from conftest import SIZES, make_target, slowly, tiny_target
from transformers import PhimoeConfig

from coral_hf import CoralDrafter
from coral_hf.decoding.caches.continuation import CACHE

SWITCH = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": SWITCH,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
TREE, CHAIN = {"speculation": "always"}, {"speculation": "always", "tree_top_k": 1}
PLAIN = {"speculation": "never"}


BATCHES = pytest.mark.parametrize("batch", [3, *slowly(1)])
SETTINGS = pytest.mark.parametrize("settings", [TREE, CHAIN, PLAIN], ids=["tree", "chain", "never"])


def phimoe():
    config = PhimoeConfig(
        **SIZES,
        intermediate_size=24,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
        original_max_position_embeddings=SWITCH,
    )
    return make_target(config)


# the first two drop their cache at the switch and read the text again, the last one reads on
TARGETS = {
    "phi3": lambda: tiny_target(
        "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=SWITCH
    ),
    "phi3_window": lambda: tiny_target(
        "phi3",
        rope_parameters=LONGROPE,
        original_max_position_embeddings=SWITCH,
        sliding_window=12,
    ),
    "phimoe": phimoe,
    "llama": lambda: tiny_target("llama", rope_parameters=LONGROPE),
}


def given(batch: int, length: int = SWITCH - 9) -> dict:
    """Prompts of which one ends before the switch, and texts that end after it."""
    ids = torch.randint(3, 40, (batch, length))
    mask = torch.ones_like(ids)
    mask[1:, :4] = mask[2:, :7] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "max_new_tokens": 30}


@BATCHES
@SETTINGS
@pytest.mark.parametrize("make", TARGETS.values(), ids=TARGETS)
def test_text_across_a_longrope_switch_equals_plain_generate(compare, make, settings, batch):
    assert compare(make(), given(batch), **settings) == "equal"


@BATCHES
@pytest.mark.usefixtures("stepping_back")
@pytest.mark.parametrize("make", TARGETS.values(), ids=TARGETS)
def test_a_call_may_step_back_before_a_switch(compare, make, batch):
    assert compare(make(), given(batch), **TREE) == "equal"


@SETTINGS
@pytest.mark.parametrize("length", [SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 5])
def test_a_prompt_may_end_anywhere_at_a_switch(compare, settings, length):
    assert compare(TARGETS["phi3"](), given(1, length), **settings) == "equal"


@BATCHES
@SETTINGS
def test_text_beyond_the_positions_of_dynamic_ntk_equals_plain_generate(compare, settings, batch):
    target = tiny_target("llama", rope_parameters=DYNAMIC, max_position_embeddings=SWITCH)
    assert compare(target, given(batch), **settings) == "equal"


@pytest.mark.parametrize("make", TARGETS.values(), ids=TARGETS)
def test_rounds_beside_a_switch_are_trees(make):
    target = make()
    call = {**given(1), **TREE, "return_dict_in_generate": True, "do_sample": False}
    drafter = CoralDrafter.from_target(target).eval()
    stats = target.generate(**call, assistant_model=drafter).stats
    # before transformers 5.24 Phi-3 forgets its text at the switch, and is read token by token
    assert stats.num_nodes > stats.num_rounds


@pytest.mark.parametrize("name", ["phi3", "llama"])
def test_a_text_goes_on_across_a_switch_from_a_cache(name):
    target, call = TARGETS[name](), given(1)
    call |= {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 6}
    drafter = CoralDrafter.from_target(target).eval()
    texts = []
    for settings in ({}, {"assistant_model": drafter, **TREE}):
        first = target.generate(**call, **settings)
        cache = {CACHE: first[CACHE]}
        more = torch.randint(3, 40, (1, 2), generator=torch.Generator().manual_seed(1))
        ids = torch.cat([first.sequences, more], 1)
        second = {**call, "input_ids": ids, "attention_mask": torch.ones_like(ids), **cache}
        texts.append(target.generate(**{**second, "max_new_tokens": 20}, **settings).sequences)
    assert texts[0].equal(texts[1])


def test_a_rotary_embedding_that_is_not_known_is_refused():
    target = tiny_target("llama")
    target.config.rope_parameters["rope_type"] = "spiral"
    with pytest.raises(ValueError, match="rotary embedding 'spiral' is not known"):
        CoralDrafter.from_target(target)
