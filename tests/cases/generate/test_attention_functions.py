"""An attention function of the user's own, registered as transformers' documentation shows it."""

import pytest
import torch
from conftest import tiny_target
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from coral_hf import CoralDrafter


def logged_sdpa(*args, **kwargs):
    """As a user wraps what there is; no mask function is registered with it."""
    return sdpa_attention_forward(*args, **kwargs)


def text_of(target):
    ids = torch.randint(3, 40, (1, 12))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 24}


@pytest.mark.parametrize("speculation", ["always", "never"])
def test_a_registered_attention_function_is_exact_or_refused(compare, speculation):
    AttentionInterface.register("logged_sdpa", logged_sdpa)
    target = tiny_target("llama")
    target.set_attn_implementation("logged_sdpa")
    assert compare(target, text_of(target), speculation=speculation) in ("equal", "refused")


def test_a_registered_attention_function_with_its_mask_function_verifies_trees(compare):
    AttentionInterface.register("masked_sdpa", logged_sdpa)
    AttentionMaskInterface.register("masked_sdpa", sdpa_mask)
    target = tiny_target("llama")
    target.set_attn_implementation("masked_sdpa")
    assert compare(target, text_of(target), tree_depth=4, tree_top_k=6) == "equal"


def test_the_refusal_of_an_attention_function_names_its_remedy():
    AttentionInterface.register("logged_sdpa", logged_sdpa)
    target = tiny_target("llama")
    target.set_attn_implementation("logged_sdpa")
    with pytest.raises(ValueError, match="'logged_sdpa'.*AttentionMaskInterface.register"):
        CoralDrafter.from_target(target)
