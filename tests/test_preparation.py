"""Inputs of a round: how several tokens at once are compared with single steps."""

import pytest
import torch
from conftest import tiny_target
from transformers import LlamaForCausalLM

from coral_hf import CoralDrafter
from coral_hf.decoding.guard import REFUSED, judge_target
from coral_hf.decoding.preparation.needs import (
    Preparation,
    Switch,
    agree,
    choose_preparation,
    further_inputs,
    overridden,
    rotary_switches,
)

DIRECT, OWN, CHECKED = Preparation
GROWN, TYPES = torch.arange(6)[None], torch.tensor([[1, 2, 3]])


class Prepares(LlamaForCausalLM):
    """A target that prepares its inputs itself."""

    shift = 0

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs["position_ids"] = inputs["position_ids"] + self.shift * input_ids.shape[1]
        return inputs


@pytest.mark.parametrize(
    ("whole", "steps"),
    [
        ([3.0, None, "a"], [[3.0, None, "a"]] * 3),
        ([GROWN], [[GROWN[:, :4]], [GROWN[:, :5]], [GROWN]]),
        ([TYPES], [[TYPES[:, :1]], [TYPES[:, 1:2]], [TYPES[:, 2:]]]),
        ([TYPES], [[TYPES]] * 3),
    ],
    ids=["the same", "grows", "one each", "the same tensor"],
)
def test_inputs_of_single_steps_agree_with_those_of_all(whole, steps):
    named = [dict(enumerate(step)) for step in steps]
    assert agree(dict(enumerate(whole)), named)
    named[1][0] = 4.0 if isinstance(whole[0], float) else named[1][0] + 1
    assert not agree(dict(enumerate(whole)), named)


@pytest.mark.parametrize(
    ("given", "way"),
    [
        ({"attention_mask": GROWN, "pixel_values": GROWN, "labels": None}, DIRECT),
        ({"token_type_ids": GROWN}, OWN),
        ({"strength": 2.0}, OWN),
        ({"layers": [-2, -1]}, OWN),
    ],
)
def test_the_most_careful_way_that_an_input_asks_for_is_taken(given, way):
    assert choose_preparation(tiny_target("llama"), given, 1, 100) == way
    assert not any(entry.way == REFUSED for _, entry in further_inputs(given))


@pytest.mark.parametrize("value", [torch.ones(1), [1.0, torch.ones(1)], {"scale": 2.0}, object()])
def test_an_input_that_holds_more_than_plain_values_is_refused(value):
    assert [entry.way for _, entry in further_inputs({"strength": value})] == [REFUSED]


def test_methods_that_prepare_inputs_are_found_by_the_class_that_has_them():
    assert overridden(tiny_target("llama")) == {}
    assert set(overridden(tiny_target("phi3")).values()) == {"Phi3ForCausalLM"}
    own = Prepares(tiny_target("llama").config)
    assert overridden(own) == {"prepare_inputs_for_generation": ""}
    assert choose_preparation(own, {}, 1, 100) == CHECKED


@pytest.mark.parametrize(("shift", "drafts"), [(0, True), (2, False)])
def test_rounds_that_differ_from_single_steps_have_one_token(shift, drafts):
    target = Prepares(tiny_target("llama").config).eval()
    drafter = CoralDrafter.from_target(target).eval()
    target.shift = shift
    given = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True}
    given |= {"attention_mask": torch.ones(1, 4, dtype=torch.long)}
    ids = torch.tensor([[3, 4, 5, 6]])
    found = target.generate(ids, assistant_model=drafter, **given)
    assert (found.stats.num_nodes > found.stats.num_rounds) == drafts
    assert found.sequences.equal(target.generate(ids, **given).sequences)


class Updates(LlamaForCausalLM):
    """A target that carries its inputs on itself."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)


def test_a_method_that_updates_inputs_is_refused_unless_it_is_known():
    own = Updates(tiny_target("llama").config).double().eval()
    assert judge_target(own).way == REFUSED
    with pytest.raises(ValueError, match="_update_model_kwargs_for_generation` of its own"):
        CoralDrafter.from_target(own)
    drafter = CoralDrafter.from_target(tiny_target("llama")).eval()
    call = {"inputs": torch.tensor([[3, 4, 5, 6]]), "do_sample": False, "max_new_tokens": 12}
    with pytest.raises(ValueError, match="; drop `assistant_model`"):
        own.generate(**call, assistant_model=drafter)
    plain = own.generate(**call)
    assert own.generate(**call, assistant_model=drafter, speculation="never").equal(plain)


def test_a_batch_whose_text_comes_to_a_switch_is_prepared_in_lockstep():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    target = tiny_target("llama", rope_parameters=rope)
    assert rotary_switches(target) == (Switch(128, True),)
    ways = [choose_preparation(target, {}, *call) for call in ((1, 200), (2, 128), (2, 129))]
    assert ways == [DIRECT, DIRECT, OWN]


def test_a_tree_ends_before_a_switch_or_begins_behind_it():
    grows, switches = Switch(8, True), Switch(8, False)
    assert [grows.room(length) for length in (5, 8, 9)] == [3, 0, 0]
    assert [switches.room(length) for length in (5, 8)] == [3, 0]
    assert switches.room(9) > 1000
