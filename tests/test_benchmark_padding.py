"""A padded target is the same function at another cost."""

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.measure import pad_target
from coral_hf.measure.padding import num_padded_layers

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_FAMILY = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 8},
    "Gemma3": {"head_dim": 8, "sliding_window": 8},
    "Olmo2": {},
    "GptOss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


@pytest.fixture(params=OF_FAMILY)
def target(request) -> PreTrainedModel:
    return build_target(request.param)


def build_target(family: str) -> PreTrainedModel:
    """A tiny model whose biases and norms are random too, so that a wrong layer shows."""
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**SIZES, **OF_FAMILY[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def test_padding_changes_no_logit_and_deepens_the_cache(target):
    ids = torch.arange(3, 23)[None]
    expected, found = target(ids), pad_target(target, 7)(ids)
    assert torch.equal(expected.logits, found.logits)
    assert (len(expected[CACHE].layers), len(found[CACHE].layers)) == (2, 7)
    assert found[CACHE].layers[6].keys.abs().sum() > 0  # it does the work of a layer


def test_a_padded_target_generates_the_same_tokens(target):
    arguments = {"max_new_tokens": 12, "do_sample": False}
    ids = torch.arange(3, 13)[None]
    expected = target.generate(ids, **arguments)
    assert torch.equal(pad_target(target, 5).generate(ids, **arguments), expected)


def test_the_target_stays_as_it_is_and_shares_its_weights(target):
    padded = pad_target(target, 4)
    assert (target.config.num_hidden_layers, padded.config.num_hidden_layers) == (2, 4)
    assert (num_padded_layers(target), num_padded_layers(padded)) == (0, 2)
    shared = {parameter.data_ptr() for parameter in target.parameters()}
    assert shared < {parameter.data_ptr() for parameter in padded.parameters()}


def test_a_target_padded_to_its_own_depth_is_no_deeper(target):
    assert num_padded_layers(pad_target(target, 2)) == 0


def test_a_target_cannot_be_padded_to_fewer_layers():
    with pytest.raises(ValueError, match="`num_layers` is 1, but LlamaForCausalLM has a list of 2"):
        pad_target(build_target("Llama"), 1)


def test_targets_not_built_like_llama_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50))
    with pytest.raises(
        ValueError, match="has a list of 0 `layers`; choose a target built like Llama"
    ):
        pad_target(gpt2, 4)
    opt = transformers.OPTConfig(
        hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=50, init_std=0.5,
    )  # fmt: skip
    with pytest.raises(ValueError, match="'o_proj', 'down_proj'"):
        pad_target(transformers.OPTForCausalLM(opt).eval(), 4)
