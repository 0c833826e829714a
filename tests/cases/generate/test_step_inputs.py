"""Inputs that plain `generate` gives a model at every step, not with the prompt alone."""

import pytest
import torch
from conftest import SIZES, scatter_weights
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import coral_hf
from coral_hf.decoding.preparation import needs

pytestmark = pytest.mark.parametrize("speculation", ["always", "never"])

LLAMA = LlamaConfig(**SIZES, intermediate_size=48)
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
SLOPE = torch.linspace(-1, 1, 40)


class Conditioned(LlamaForCausalLM):
    """A model with an input of its own."""

    def forward(self, input_ids=None, position_ids=None, strength=0.0, **kwargs):
        out = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        out.logits = out.logits + strength * SLOPE.to(out.logits.dtype)
        return out


class Prepares(Conditioned):
    """A model that makes its input at each step."""

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        kwargs |= {"attention_mask": attention_mask, "strength": 40.0}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


class Updates(Conditioned):
    """A model that carries its input on from step to step."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        found = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return {**found, "strength": -found.get("strength", 1.0)}


class Counts(Conditioned):
    """A model whose input is another one at each step."""

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        kwargs["attention_mask"] = attention_mask
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**inputs, "strength": 10.0 * (input_ids.shape[1] % 3)}


class Leans(Conditioned):
    """A model whose input follows the newest token."""

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        kwargs["attention_mask"] = attention_mask
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**inputs, "strength": 10.0 * float(input_ids[0, -1] % 3)}


@pytest.fixture
def outcome(compare):
    """Of `compare`, for a model with scattered weights and an input of its own."""

    def found(model, speculation, rows=1, **given):
        scatter_weights(model)
        ids = torch.randint(3, 40, (rows, 10))
        mask = torch.ones_like(ids)
        mask[1:, :4] = 0
        given = {"input_ids": ids, "attention_mask": mask, **given}
        return compare(model.double().eval(), given, speculation=speculation)

    return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("own", [5, 9])
def test_token_types_reach_every_round(outcome, speculation, rows, own):
    target = GPT2LMHeadModel(GPT2Config(**GPT2))
    types = torch.tensor([[3] * own + [4] * (10 - own)]).repeat(rows, 1)
    assert outcome(target, speculation, rows, token_type_ids=types) == "equal"


def test_states_of_an_encoder_reach_every_round(outcome, speculation):
    config = GPT2Config(**GPT2, add_cross_attention=True)
    states = torch.randn(1, 6, 32).double()
    found = outcome(GPT2LMHeadModel(config), speculation, encoder_hidden_states=states)
    assert found == "equal"


def test_an_input_of_the_models_own_reaches_every_round(outcome, speculation):
    found = outcome(Conditioned(LLAMA), speculation, strength=40.0)
    assert found == "equal"


def test_a_model_that_prepares_its_inputs_gets_to_do_so_in_every_round(outcome, speculation):
    assert outcome(Prepares(LLAMA), speculation) == "equal"


def test_a_model_that_updates_its_inputs_is_refused(outcome, speculation):
    assert outcome(Updates(LLAMA), speculation, strength=2.0) == "refused"


def test_an_input_that_changes_with_the_text_gets_what_each_step_would(outcome, speculation):
    for kind in (Counts, Leans):
        assert outcome(kind(LLAMA), speculation) == "equal"


def test_an_input_of_the_models_own_is_refused_until_it_is_registered(
    outcome, speculation, monkeypatch
):
    given = {"rows": 3, "strength": torch.linspace(20, 60, 3)[:, None, None]}
    found = outcome(Conditioned(LLAMA), speculation, **given)
    assert found == ("refused" if speculation == "always" else "equal")
    monkeypatch.setattr(needs, "INPUTS", dict(needs.INPUTS))
    coral_hf.register_input("strength")
    assert outcome(Conditioned(LLAMA), speculation, **given) == "equal"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("made", ["replaced", "subclass"])
def test_a_forward_that_takes_anything_is_asked_what_it_wraps(outcome, speculation, rows, made):
    for target in (LlamaForCausalLM(LLAMA), GPT2LMHeadModel(GPT2Config(**GPT2))):
        own, kind = target.forward, type(target)
        forward = kind.forward if made == "subclass" else own

        def wrapped(*args, forward=forward, **kwargs):
            return forward(*args, **kwargs)

        if made == "subclass":
            target.__class__ = type(kind.__name__, (kind,), {"forward": wrapped})
        else:
            target.forward = wrapped
        assert outcome(target, speculation, rows) == "equal"
