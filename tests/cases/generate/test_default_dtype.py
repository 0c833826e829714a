"""Chance does not depend on torch's default dtype, which training scripts set to bfloat16."""

import pytest
import torch
from conftest import tiny_target
from transformers import LlamaConfig, LlamaForCausalLM

from coral_hf import CoralDrafter

TREE = {"speculation": "always", "tree_depth": 1, "tree_top_k": 20, "tree_nodes": 21}


@pytest.fixture
def sample():
    """Samples with a drafter while torch's default dtype is another."""

    def samples(target, drafter, ids, dtype, **settings):
        given = {"attention_mask": torch.ones_like(ids), "do_sample": True, "top_k": 0, **settings}
        torch.set_default_dtype(dtype)
        return target.generate(ids, assistant_model=drafter, **given, **TREE)

    before = torch.get_default_dtype()
    yield samples
    torch.set_default_dtype(before)


def test_a_seed_gives_the_same_samples_whatever_the_default_dtype(sample):
    target = tiny_target("llama", torch.float32)
    drafter, ids = CoralDrafter.from_target(target).eval(), torch.randint(3, 40, (4, 9))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        found.append(sample(target, drafter, ids, dtype, max_new_tokens=24))
    assert found[0].equal(found[1])


def test_a_rare_token_that_is_drafted_is_accepted_as_rarely_as_the_target_says_it(sample):
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=None,
    )
    target = LlamaForCausalLM(config).eval()  # as it is initialised, it says all tokens alike
    drafter, ids = CoralDrafter.from_target(target).eval(), torch.ones(50, 2, dtype=torch.long)
    output = sample(
        target, drafter, ids, torch.bfloat16, max_new_tokens=24, return_dict_in_generate=True
    )
    # one of 20 drafted tokens in 1.005 of rounds; 1.02 would be seven standard deviations more
    assert output.stats.acceptance_length < 1.02


@pytest.mark.slow
def test_samples_follow_the_targets_distribution_whatever_the_default_dtype(sample):
    target = tiny_target("llama", torch.float32)
    drafter, ids = CoralDrafter.from_target(target).eval(), torch.randint(3, 40, (1, 9))
    with torch.no_grad():
        first = target(ids).logits[0, -1].softmax(-1)
        longer = torch.cat([ids.repeat(40, 1), torch.arange(40)[:, None]], 1)
        second = first @ target(longer).logits[:, -1].softmax(-1)
    texts = [
        sample(target, drafter, ids.repeat(200, 1), torch.bfloat16, max_new_tokens=3)
        for _ in range(100)
    ]
    expected = 20_000 * second
    counts = torch.cat(texts)[:, -2].bincount(minlength=40)
    assert float(((counts - expected) ** 2 / expected).sum()) < 73  # p = 0.001
