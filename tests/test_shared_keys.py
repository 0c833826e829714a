"""A tree's attention to keys that several heads share equals attention to copies of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from coral_hf.decoding.caches.shared_keys import attend, attend_packed, sharing_keys

BATCH, KV, GROUPS, NODES, SLOTS, WIDTH = 2, 3, 4, 7, 301, 16


def inputs(dtype):
    """Queries, keys, values, and a mask that hides a third."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(KV * GROUPS, NODES), (KV, SLOTS), (KV, SLOTS)]
    states = [
        torch.randn(BATCH, *size, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for size in sizes
    ]
    mask = torch.zeros(BATCH, 1, NODES, SLOTS, dtype=dtype)
    hidden = torch.rand(mask.shape, generator=generator) < 1 / 3
    return *states, mask.masked_fill(hidden, torch.finfo(dtype).min)


@pytest.mark.parametrize("function", [attend, attend_packed])
def test_shared_keys_give_what_copies_give(function):
    query, key, value, mask = inputs(torch.float64)
    copies = (states.repeat_interleave(GROUPS, dim=1) for states in (key, value))
    expected = F.scaled_dot_product_attention(query, *copies, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(function(query, key, value, mask, 0.3), expected)


@pytest.mark.parametrize("function", [attend, attend_packed])
def test_shared_keys_are_not_copied(function):
    given = inputs(torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*given)
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert 0 < max(sizes) < given[1].nbytes


def make_layer():
    """What transformers' function reads of an attention layer."""
    layer = nn.Module().eval()
    layer.num_key_value_groups, layer.is_causal = GROUPS, True
    return layer


def attended(module, mask, **kwargs):
    query, key, value, _ = inputs(torch.float64)
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return function(module, query, key, value, mask, scaling=0.3, **kwargs)[0]


@pytest.mark.parametrize("kind", ["tree", "image", "none"])
def test_layers_attend_as_by_transformers(kind):
    mask = {"tree": inputs(torch.float64)[3], "none": None}.get(kind)
    if kind == "image":  # a mask by head, as no tree has
        mask = inputs(torch.float64)[3].repeat(1, KV * GROUPS, 1, 1)
    module = make_layer()
    expected = attended(module, mask)
    with sharing_keys():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
        torch.testing.assert_close(attended(module, mask), expected)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def outcome(module, **kwargs):
    """What attention gives, or why it gives nothing."""
    try:
        return attended(module, inputs(torch.float64)[3], **kwargs).tolist()
    except ValueError as error:  # newer versions refuse what older ones leave out
        return str(error)


@pytest.mark.parametrize("name", ["position_bias", "softcap"])
def test_what_changes_scores_is_left_to_transformers(name):
    bias = torch.randn(1, KV * GROUPS, NODES, SLOTS, dtype=torch.float64)
    given = {name: {"position_bias": bias, "softcap": 5.0}[name]}
    expected = outcome(make_layer(), **given)
    with sharing_keys():
        assert outcome(make_layer(), **given) == expected


def test_an_attention_function_of_others_stays(monkeypatch):
    def own(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", own)
    with sharing_keys():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own


def test_a_pass_that_fails_leaves_the_attention_function_of_transformers():
    with pytest.raises(RuntimeError, match="out of memory"), sharing_keys():
        raise RuntimeError("out of memory")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
