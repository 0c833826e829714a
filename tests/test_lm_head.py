"""A target's LM head, read whole or by what stands in for it."""

import copy
import pickle
import weakref

import pytest
import torch
from head_inputs import make_head, make_level
from torch import nn

from coral_hf.lm_head import Derived, LMHead

HIDDEN = 16


def test_logits_are_scaled_before_they_are_capped():
    head = make_head(10, scale=3.0, softcap=2.0)
    features, _ = make_level()
    raw = features @ head.weight.T
    torch.testing.assert_close(head.logits(features), 2.0 * torch.tanh(3.0 * raw / 2.0))


@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_some_tokens_are_a_part_of_all_logits(bias):
    head = make_head(10, bias, scale=3.0, softcap=2.0)
    features, _ = make_level()
    tokens = torch.tensor([7, 3, 4])
    some = head.logits_of(features, head.weight[tokens], tokens)
    torch.testing.assert_close(some, head.logits(features)[..., tokens])


def test_a_token_that_is_none_stays_impossible_through_scale_and_cap():
    head = make_head(10, scale=3.0, softcap=2.0)
    logits = torch.tensor([1.0, float("-inf")])
    assert head.finish(logits).tolist() == [2 * torch.tanh(torch.tensor(1.5)), float("-inf")]


def test_features_are_cast_to_the_heads_dtype():
    head = LMHead(nn.Linear(HIDDEN, 10, bias=False).bfloat16())
    features, _ = make_level()
    assert head.logits(features).dtype == torch.bfloat16
    assert head.logits_of(features, head.weight).dtype == torch.bfloat16


# ---- what is derived from a head


def test_what_is_derived_is_computed_once_for_the_same_sources():
    weight, calls, derived = torch.ones(3), [], Derived()

    def double():
        calls.append(1)
        return weight * 2

    assert derived.of([weight], double) is derived.of([weight], double)
    assert len(calls) == 1


@pytest.mark.parametrize("change", ["another tensor", "an equal tensor", "written to", "moved"])
def test_what_is_derived_follows_its_sources(change):
    first, derived = torch.ones(3), Derived()
    weight = first
    derived.of([weight], lambda: weight * 2)
    if change == "another tensor":
        weight = torch.full((3,), 5.0)
    elif change == "an equal tensor":
        weight = torch.ones(3)
        assert derived.of([weight], lambda: weight * 10).tolist() == [10.0] * 3
        return
    elif change == "written to":
        weight.fill_(5.0)
    else:
        weight.data = torch.full((3,), 5.0)
    assert derived.of([weight], lambda: weight * 2).tolist() == [10.0] * 3


def test_what_is_derived_goes_with_its_source():
    sources, derived = [torch.ones(3)], Derived()
    kept = weakref.ref(derived.of(sources, lambda: torch.ones(2)))
    assert kept() is not None
    sources.clear()
    assert kept() is None


def test_what_is_derived_does_not_travel():
    derived = Derived()
    derived.of([torch.ones(3)], lambda: torch.ones(2))
    for other in (copy.deepcopy(derived), pickle.loads(pickle.dumps(derived))):
        assert other._kept is None


def test_sources_of_inference_mode_can_be_derived_from():
    with torch.inference_mode():
        weight = torch.ones(3)
        assert Derived().of([weight], lambda: weight * 2).tolist() == [2.0] * 3
