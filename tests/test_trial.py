"""Code of others in a target is tried: what is exact drafts, what is not is refused."""

import pytest
import torch
from conftest import FAMILIES, OTHERS, any_target, tiny_target
from torch import nn
from transformers import LlamaForCausalLM

from coral_hf import CoralDrafter
from coral_hf.decoding.guard import CHAIN, REFUSED, TREE, judge_target
from coral_hf.decoding.guard.foreign import NEW, PROMPTS
from coral_hf.decoding.guard.trial import VOCAB, small_copy, try_target

TREES = {"tree_depth": 4, "tree_top_k": 6, "tree_nodes": 24}
PROMPT = {"input_ids": torch.arange(3, 14)[None], "attention_mask": torch.ones(1, 11).long()}
SOME = ["llama", "gemma3", "gpt2", "gpt_neo", "llama4", "falcon_alibi"]


def of_class(made: type) -> LlamaForCausalLM:
    """A target of a class of others, with the weights of a tiny Llama."""
    target = tiny_target("llama")
    other = made(target.config).double().eval()
    other.load_state_dict(target.state_dict())
    return other


def assert_drafts_its_own_text(target, **shape) -> None:
    call = {**PROMPT, "do_sample": False, "max_new_tokens": 16}
    plain = target.generate(**call)
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    assert target.generate(**call, assistant_model=drafter, **shape).equal(plain)


# ---- the trial itself


@pytest.mark.parametrize("name", SOME)
def test_a_trial_finds_what_the_tables_say(name):
    target = any_target(name, torch.float32)
    assert try_target(small_copy(target), PROMPTS, NEW).way == judge_target(target).way


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*FAMILIES, *OTHERS} - {*SOME}))
def test_a_trial_finds_what_the_tables_say_of_every_family(name):
    target = any_target(name, torch.float32)
    assert try_target(small_copy(target), PROMPTS, NEW).way == judge_target(target).way


def test_a_copy_has_a_layer_of_each_kind_and_leaves_chance_as_it_was():
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    target = tiny_target("gemma3", num_hidden_layers=6, layer_types=types, vocab_size=400)
    state = torch.get_rng_state()
    made = small_copy(target.bfloat16())
    assert torch.get_rng_state().equal(state)
    assert made.config.layer_types == ["sliding_attention", "full_attention"]
    assert made.dtype == torch.float32 and made.config.vocab_size == VOCAB
    assert len(target.model.layers) == 6 and target.config.vocab_size == 400


# ---- classes


class Renamed(LlamaForCausalLM):
    """A class of others that computes what its parent does."""


class ByOrder(LlamaForCausalLM):
    """A class of others whose logits depend on the place of a token in its pass."""

    def forward(self, *args, position_ids=None, **kwargs):
        output = super().forward(*args, position_ids=position_ids, **kwargs)
        places = torch.arange(output.logits.shape[1], dtype=output.logits.dtype)
        output.logits = output.logits + places[:, None] * torch.linspace(-1, 1, VOCAB)[:40]
        return output


class ByLast(LlamaForCausalLM):
    """A class of others that masks nothing but by the order of slots: no tree, but chains."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = None
        kwargs.pop("position_ids", None)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize(("made", "way"), [(Renamed, TREE), (ByOrder, REFUSED), (ByLast, CHAIN)])
def test_a_class_of_others_is_tried(made, way):
    target = of_class(made)
    judgement = judge_target(target)
    assert judgement.way == way
    if way == REFUSED:
        with pytest.raises(ValueError, match="its class ByOrder is none of transformers and was"):
            CoralDrafter.from_target(target)
        return
    assert_drafts_its_own_text(target)


def test_a_target_is_tried_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "coral_hf.decoding.guard.foreign.try_target",
        lambda *args: calls.append(1) or try_target(*args),
    )
    target = of_class(Renamed)
    assert judge_target(target) == judge_target(target)
    assert len(calls) == 1


# ---- modules


class Shifted(nn.Module):
    """A feed-forward block of others; it adds what the token before it had, if `looks_back`."""

    def __init__(self, inner: nn.Module, looks_back: bool):
        super().__init__()
        self.inner, self.looks_back = inner, looks_back

    def forward(self, states):
        out = self.inner(states)
        return out + out.roll(1, dims=1) if self.looks_back else 2 * out


@pytest.mark.parametrize("looks_back", [False, True])
def test_a_module_of_others_is_tried(looks_back):
    target = tiny_target("llama")
    target.model.layers[0].mlp = Shifted(target.model.layers[0].mlp, looks_back)
    judgement = judge_target(target)
    assert judgement.way == (REFUSED if looks_back else TREE)
    if looks_back:
        assert "its module Shifted is none of transformers" in judgement.obstacle
    else:
        assert_drafts_its_own_text(target, **TREES)


# ---- hooks


def steer(module, inputs, output):
    """A hook that changes all tokens of a pass alike."""
    return output + 0.5


def steer_last(module, inputs, output):
    """A hook that changes the last token of a pass."""
    output[:, -1] += 0.5


def look(module, inputs, output):
    """A hook that changes nothing."""


@pytest.mark.parametrize(("hook", "way"), [(steer, TREE), (steer_last, REFUSED), (look, TREE)])
def test_a_hook_is_tried(hook, way):
    target = tiny_target("llama")
    target.model.layers[0].mlp.register_forward_hook(hook)
    judgement = judge_target(target, rows=1)
    assert judgement.way == way and judgement.keeps_rows
    if way == REFUSED:
        assert "its forward hook steer_last was put there by others" in judgement.obstacle
    else:
        assert_drafts_its_own_text(target, **TREES)


def test_a_target_without_code_of_others_is_not_tried(monkeypatch):
    monkeypatch.setattr("coral_hf.decoding.guard.foreign.try_target", pytest.fail)
    assert judge_target(tiny_target("llama")) == judge_target(tiny_target("gemma3"))
