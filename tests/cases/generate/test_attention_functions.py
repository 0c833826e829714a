"""An attention function of the user's own, registered as transformers' documentation shows it."""

import pytest
import torch
from conftest import tiny_target
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def logged_sdpa(*args, **kwargs):
    """As a user wraps what there is; no mask function is registered with it."""
    return sdpa_attention_forward(*args, **kwargs)


other_text = pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="a chain is verified without a mask: another text"
)


@pytest.mark.parametrize("speculation", [pytest.param("always", marks=other_text), "never"])
def test_a_registered_attention_function_is_exact_or_refused(compare, speculation):
    AttentionInterface.register("logged_sdpa", logged_sdpa)
    target = tiny_target("llama")
    target.set_attn_implementation("logged_sdpa")
    ids = torch.randint(3, 40, (1, 12))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 24}
    assert compare(target, given, speculation=speculation) in ("equal", "refused")
