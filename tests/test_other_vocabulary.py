"""Drafters follow a target whose vocabulary has grown, shrunk or been padded since."""

import pytest
import torch
from bigram import BigramDrafter
from conftest import VOCAB, scatter_weights, tiny_target
from enumerated import p_value
from test_target import make_tokenizer

from coral_hf import CoralConfig, CoralDrafter
from coral_hf.identity import check_tokenizer, record_tokenizer, tokenizer_hash
from coral_hf.target import read_target

PROMPTS = torch.tensor([[1, 2, 3], [4, 9, 5]])
TREE = {"tree_depth": 3, "tree_top_k": 5, "tree_nodes": 16}
# how many rows an embedding of `VOCAB` rows gets
CHANGES = {
    "gained": {"new_num_tokens": VOCAB + 3},
    "padded": {"pad_to_multiple_of": 64},
    "lost": {"new_num_tokens": VOCAB - 7},
    "lost most": {"new_num_tokens": 12},
}


def routed(drafter, order):
    drafter.heads.add_router(5, 2, order)
    drafter.heads.configure(is_router_trained=True, draft_head="routed")


# the heads of a drafter for a vocabulary of a size, and what reads them
HEADS = {
    "full": lambda drafter, target, size: None,
    "frequency": lambda drafter, target, size: drafter.heads.add_frequency_head(
        torch.arange(size).flip(0)[: size // 2]
    ),
    "routed": lambda drafter, target, size: routed(drafter, None),
    "quantized": lambda drafter, target, size: drafter.heads.configure(draft_head="quantized"),
    "routed by an order": lambda drafter, target, size: routed(drafter, torch.arange(size).flip(0)),
}


def resized_pair(head: str, change: dict, bias=False, size=VOCAB, **settings):
    """A target whose embedding was resized after its drafter was made."""
    torch.manual_seed(0)
    target = tiny_target("llama", vocab_size=size, **settings)
    if bias:
        target.lm_head.bias = torch.nn.Parameter(torch.zeros(size, dtype=target.dtype))
    if head == "bigram":
        drafter = BigramDrafter.from_texts([torch.randint(size, (400,))], size, top_k=5)
    else:
        drafter = CoralDrafter.from_target(target).eval()
        HEADS[head](drafter, target, size)
    target.resize_token_embeddings(**change, mean_resizing=False)
    scatter_weights(target)  # the new tokens are as probable as the old ones
    return target, drafter


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("head", [*HEADS, "bigram"])
@torch.no_grad()
def test_greedy_tokens_equal_those_of_a_resized_target_alone(head, change):
    # a bias of the LM head is grouped as its rows are
    target, drafter = resized_pair(head, CHANGES[change], bias="routed" in head)
    prompts = PROMPTS.clamp(max=target.config.vocab_size - 1)
    given = {"do_sample": False, "max_new_tokens": 14}
    expected = target.generate(prompts, **given)
    for settings in (TREE, {"tree_top_k": 1}):
        ours = target.generate(prompts, assistant_model=drafter, **given, **settings)
        assert ours.equal(expected)


@pytest.mark.parametrize("rule", [pytest.param("chosen", marks=pytest.mark.slow), "drawn"])
@pytest.mark.parametrize("size", [9, 6], ids=["gained", "lost"])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_samples_fit_a_resized_target(head, size, rule):
    sizes = {"size": 8, "bos_token_id": None, "pad_token_id": None}
    target, drafter = resized_pair(head, {"new_num_tokens": size}, **sizes)
    prompt = PROMPTS[:1]
    first = target(prompt).logits[0, -1].softmax(-1)  # (vocab,)
    texts = torch.cat([prompt.expand(size, -1), torch.arange(size)[:, None]], dim=1)
    chances = first[:, None] * target(texts).logits[:, -1].softmax(-1)  # (vocab, vocab)
    given = {"do_sample": True, "top_k": 0, "max_new_tokens": 2, "drawn_tree": rule == "drawn"}
    texts = target.generate(
        prompt, assistant_model=drafter, num_return_sequences=4000, **given, **TREE
    )
    counts = (texts[:, -2] * size + texts[:, -1]).bincount(minlength=size**2)
    assert p_value(counts, chances) > 1e-4


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["frequency", "routed", "routed by an order"])
@torch.no_grad()
def test_a_head_proposes_what_it_and_the_target_know_with_the_targets_logits(name, change):
    target, drafter = resized_pair(name, CHANGES[change], bias=True)
    whole, size = read_target(target).head, target.config.vocab_size
    head = drafter.heads.bind(whole)
    features, log_path = torch.randn(1, 4, 32, dtype=torch.float64), torch.zeros(1, 4)
    logits = head.logits(features, log_path)
    is_read = logits.isfinite()
    assert logits.shape[-1] == size and is_read.any(-1).all()
    assert not is_read[..., VOCAB:].any()  # tokens that were added since
    torch.testing.assert_close(logits[is_read], whole.logits(features).float()[is_read])
    children = head.children(features, log_path, min(16, size))
    is_child = children.log_confidence > float("-inf")
    assert children.tokens.max() < size and not children.log_confidence.isnan().any()
    assert is_read.gather(2, children.tokens)[is_child].all()


def test_a_target_of_another_family_and_vocabulary_is_refused():
    drafter = CoralDrafter.from_target(tiny_target("llama")).eval()
    other = tiny_target("qwen3", vocab_size=VOCAB + 8)
    with pytest.raises(ValueError, match="`vocab_size` of the target is 48"):
        other.generate(PROMPTS, assistant_model=drafter, max_new_tokens=2)


def test_a_tokenizer_that_has_gained_tokens_is_the_drafters_own():
    config, tokenizer = CoralConfig(), make_tokenizer(*"cab")
    record_tokenizer(tokenizer, config)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["aa", "zz"])
    check_tokenizer(tokenizer, config)
    record_tokenizer(tokenizer, config)  # those that it was trained with stay known
    assert config.tokenizer_hash == tokenizer_hash(make_tokenizer(*"cab"))
    assert config.tokenizer_size == 3


@pytest.mark.parametrize("words", ["acb", "ca", "cxbd"])
def test_a_tokenizer_whose_first_tokens_are_others_is_refused(words):
    config = CoralConfig()
    record_tokenizer(make_tokenizer(*"cab"), config)
    with pytest.raises(ValueError, match="maps tokens to other ids"):
        check_tokenizer(make_tokenizer(*words), config)
