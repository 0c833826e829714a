"""Rotary embeddings that change with the length of the text: LongRoPE and dynamic NTK."""

import pytest
import torch
from conftest import tiny_target

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

other_text = pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="another text from the switch on"
)


@pytest.fixture
def given():
    """A prompt that ends before the switch, and a text that ends after it."""
    ids = torch.randint(3, 40, (1, SWITCH - 4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 24}


@pytest.mark.parametrize(
    "settings",
    [pytest.param(TREE, marks=other_text), pytest.param(CHAIN, marks=other_text), PLAIN],
    ids=["tree", "chain", "never"],
)
def test_text_across_a_longrope_switch_equals_plain_generate(compare, given, settings):
    target = tiny_target("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=SWITCH)
    assert compare(target, given, **settings) in ("equal", "refused")


@pytest.mark.parametrize(
    "settings",
    [pytest.param(TREE, marks=other_text), pytest.param(CHAIN, marks=other_text), PLAIN],
    ids=["tree", "chain", "never"],
)
def test_text_beyond_the_positions_of_dynamic_ntk_equals_plain_generate(compare, given, settings):
    target = tiny_target("llama", rope_parameters=DYNAMIC, max_position_embeddings=SWITCH)
    assert compare(target, given, **settings) in ("equal", "refused")
