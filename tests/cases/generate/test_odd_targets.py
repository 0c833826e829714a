"""Targets that lack something: they work, or `from_target` says what is missing."""

import pytest
import torch
from conftest import SIZES, scatter_weights
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    CodeGenConfig,
    LlamaConfig,
    LlamaModel,
    OpenAIGPTConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from coral_hf import CoralDrafter

ENDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": None}
PADDED = {**ENDS, "pad_token_id": 0}


def codegen():
    # its config has no pad token at all
    return AutoModelForCausalLM.from_config(
        CodeGenConfig(**ENDS, n_embd=32, n_layer=2, n_head=4, rotary_dim=8)
    )


def encoder_decoder():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


def without_head():
    return LlamaModel(LlamaConfig(**SIZES, intermediate_size=48))


def narrow_embeddings():
    # as OPT-350m: embeddings and LM head are projected
    config = OPTConfig(
        **PADDED,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
    )
    return AutoModelForCausalLM.from_config(config)


def without_cache():
    return AutoModelForCausalLM.from_config(
        OpenAIGPTConfig(**PADDED, n_embd=32, n_layer=2, n_head=4)
    )


def half_of_two():
    config = BartConfig(
        **PADDED,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        forced_eos_token_id=None,
    )
    return BartForCausalLM(config)


@pytest.mark.parametrize(
    "make",
    [
        codegen,
        encoder_decoder,
        without_head,
        narrow_embeddings,
        without_cache,
        half_of_two,
    ],
)
def test_an_odd_target_works_or_is_refused_with_its_name(make):
    target = make().double().eval()
    scatter_weights(target)
    try:
        drafter = CoralDrafter.from_target(target).eval()
    except ValueError as error:
        assert make is not codegen and type(target).__name__ in str(error)
        return
    ids = torch.tensor([[5, 6, 7]])
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8}
    ours = target.generate(ids, assistant_model=drafter, **given)
    assert ours.equal(target.generate(ids, **given))
