"""A target's LM head, read whole or by what stands in for it."""

import copy
import pickle
import weakref

import pytest
import torch
from head_inputs import make_head, make_level
from torch import nn

from coral_hf.lm_head import Cached, LMHead

HIDDEN = 16


def test_logits_are_scaled_before_they_are_capped():
    head = make_head(10, scale=3.0, softcap=2.0)
    features, _ = make_level()
    raw = features @ head.weight.T
    torch.testing.assert_close(head.logits(features), 2.0 * torch.tanh(3.0 * raw / 2.0))


def test_a_logit_of_minus_infinity_stays_impossible_through_scale_and_cap():
    head = make_head(10, scale=3.0, softcap=2.0)
    logits = torch.tensor([1.0, float("-inf")])
    assert head.finish(logits).tolist() == [2 * torch.tanh(torch.tensor(1.5)), float("-inf")]


def test_features_are_cast_to_the_heads_dtype():
    head = LMHead(nn.Linear(HIDDEN, 10, bias=False).bfloat16())
    features, _ = make_level()
    assert head.logits(features).dtype == torch.bfloat16


# ---- tensors cached from a head


def test_a_cached_tensor_is_computed_once_for_the_same_sources():
    weight, calls, cached = torch.ones(3), [], Cached()

    def double():
        calls.append(1)
        return weight * 2

    assert cached.get([weight], double) is cached.get([weight], double)
    assert len(calls) == 1


@pytest.mark.parametrize("change", ["another tensor", "an equal tensor", "written to", "moved"])
def test_a_cached_tensor_follows_its_sources(change):
    first, cached = torch.ones(3), Cached()
    weight = first
    cached.get([weight], lambda: weight * 2)
    if change == "another tensor":
        weight = torch.full((3,), 5.0)
    elif change == "an equal tensor":
        weight = torch.ones(3)
        assert cached.get([weight], lambda: weight * 10).tolist() == [10.0] * 3
        return
    elif change == "written to":
        weight.fill_(5.0)
    else:
        weight.data = torch.full((3,), 5.0)
    assert cached.get([weight], lambda: weight * 2).tolist() == [10.0] * 3


def test_a_cached_tensor_is_freed_with_its_source():
    sources, cached = [torch.ones(3)], Cached()
    kept = weakref.ref(cached.get(sources, lambda: torch.ones(2)))
    assert kept() is not None
    sources.clear()
    assert kept() is None


def test_a_cached_tensor_is_not_copied():
    cached = Cached()
    cached.get([torch.ones(3)], lambda: torch.ones(2))
    for other in (copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):
        assert not other._cached


def test_sources_of_inference_mode_can_be_cached_from():
    with torch.inference_mode():
        weight = torch.ones(3)
        assert Cached().get([weight], lambda: weight * 2).tolist() == [2.0] * 3
