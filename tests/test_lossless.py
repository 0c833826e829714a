"""Lossless: greedy gives the target's own tokens, sampling the target's own distribution."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from conftest import shared_file, tiny_target
from enumerated import (
    TINY,
    VOCAB,
    chances_of_all_texts,
    own_chances,
    p_value,
    sample_texts,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from coral_hf import CoralDrafter
from coral_hf.decoding import rules
from coral_hf.decoding.drafting import TreeShape
from coral_hf.decoding.rules import Step, token_step
from coral_hf.drafters.tree_builders import SampledTreeBuilder

TREE = {"tree_depth": 4, "tree_top_k": 6, "tree_nodes": 24}
SEEDS = (11, 22, 33)


def greedy_text(target, prompt, max_new_tokens=24, **drafting):
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **drafting}
    return target.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


CHAIN = {"tree_depth": 4, "tree_top_k": 1, "tree_nodes": 5}
WAYS = {
    "growing": {},
    "static": {"cache_implementation": "static"},
    "compiled": {"compile_config": CompileConfig(backend="eager")},
}


@cache
def trained(name):
    """A trained target, a random drafter, a prompt, and the target's own text."""
    folder = shared_file(f"targets/{name}")
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    prompt = tokenizer("Once upon a time there was", return_tensors="pt").input_ids
    return target, drafter, prompt, greedy_text(target, prompt, 40)


@pytest.mark.parametrize(
    "way", ["growing", "static", pytest.param("compiled", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("shape", [TREE, CHAIN], ids=["tree", "chain"])
@pytest.mark.parametrize(
    "name",
    ["stories260k-hf", "bitnet3m-hf", pytest.param("coral-bench", marks=pytest.mark.slow)],
)
def test_greedy_tokens_equal_a_trained_target_alone(name, shape, way):
    target, drafter, prompt, plain = trained(name)
    drafted = greedy_text(target, prompt, 40, assistant_model=drafter, **shape, **WAYS[way])
    assert torch.equal(plain, drafted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral_window", "phi3", "gpt2"])
@pytest.mark.parametrize("shape", [TREE, CHAIN], ids=["tree", "chain"])
def test_greedy_tokens_equal_the_target_alone_when_inductor_compiles(family, shape):
    target = tiny_target(family)
    target.generation_config.pad_token_id = 0
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    prompt = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    compiled = {"compile_config": CompileConfig(), "assistant_model": drafter, **shape}
    drafted = greedy_text(target, prompt, 30, **compiled)
    assert torch.equal(greedy_text(target, prompt, 30), drafted)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("rule", ["chosen", "drawn", "traversal"])
def test_samples_are_those_of_static_rounds_when_inductor_compiles(rule, rows):
    target = tiny_target("llama")
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    prompt = torch.randint(3, 40, (rows, 9), generator=torch.Generator().manual_seed(0))
    settings = {"verification": "traversal" if rule == "traversal" else "token"}
    if rule != "traversal":
        settings["drawn_tree"] = rule == "drawn"
    found = []
    for way in ({"cache_implementation": "static"}, {"compile_config": CompileConfig()}):
        for seed in range(3):
            torch.manual_seed(seed)
            keep = {"do_sample": True, "max_new_tokens": 40, "pad_token_id": 0}
            sampled = target.generate(prompt, assistant_model=drafter, **keep, **settings, **way)
            found.append(sampled)
    assert all(a.equal(b) for a, b in zip(found[:3], found[3:], strict=True))
    assert not found[0].equal(found[1])


@pytest.mark.parametrize("way", ["static", pytest.param("compiled", marks=pytest.mark.slow)])
def test_threads_share_a_target_and_a_drafter(way):
    target = tiny_target("llama")
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    chance = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 40, (1, length), generator=chance) for length in (5, 9, 14, 20)]
    expected = [greedy_text(target, text) for text in texts]
    drafting = {"assistant_model": drafter, **TREE, **WAYS[way]}
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda text: greedy_text(target, text, **drafting), texts)
        assert all(one.equal(text) for one, text in zip(found, expected, strict=True))


def without_residual(siblings, target_probs, chance):
    """A mistake: what comes after the accepted nodes is drawn from p, whatever was rejected."""
    step = token_step(siblings, target_probs, chance)
    return Step(torch.where(step.child > 0, step.token, chance.draw(target_probs)), step.child)


@pytest.fixture(scope="module")
def pair():
    """A target of four tokens, of which every text is likely enough, and a random drafter."""
    target = tiny_target("llama", **TINY)
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    for parameter in drafter.parameters():
        parameter.data.mul_(3)
    return target, drafter


@pytest.mark.parametrize(
    "shape", [TreeShape(2, 1, 3), TreeShape(2, 2, 7), TreeShape(2, 3, 6), TreeShape(1, 4, 5)]
)
@torch.no_grad()
def test_output_distribution_is_exactly_the_targets(pair, shape):
    found, own = chances_of_all_texts(*pair, shape), own_chances(pair[0])
    assert abs(float(found.sum()) - 1) < 1e-9
    torch.testing.assert_close(found, own, rtol=0, atol=1e-9)


def with_heads(target, drafter, **config):
    """A copy of the drafter with every draft head, none of which has learned anything."""
    drafter = copy.deepcopy(drafter)
    torch.manual_seed(0)
    drafter.heads.add_router(3, 1, torch.tensor([2, 0, 3, 1]))  # groups of 2, 2 and no tokens
    drafter.heads.add_frequency_head(torch.tensor([3, 1]))
    for name, value in {"is_router_trained": True, "active_mass": None, **config}.items():
        setattr(drafter.config, name, value)
    return drafter


# every way to read less than the whole head as it is
HEADS = {
    "shared": {"draft_head": "routed"},
    "shared until sure": {"draft_head": "routed", "num_active_groups": 2, "active_mass": 0.6},
    "per_node": {"draft_head": "routed", "routing": "per_node"},
    "frequency": {"draft_head": "frequency"},
    "quantized": {"draft_head": "quantized"},
}


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_what_the_drafter_reads_does_not_change_the_distribution(pair, head):
    target, drafter = pair[0], with_heads(*pair, **HEADS[head])
    # trees of one and of two children: a head of two tokens has no third
    for shape in (TreeShape(2, 1, 3), TreeShape(2, 2, 7)):
        found = chances_of_all_texts(target, drafter, shape)
        torch.testing.assert_close(found, own_chances(target), rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rule", ["chosen", "drawn", "traversal"])
@pytest.mark.slow  # the trees of every head are enumerated above
@torch.no_grad()
def test_samples_drafted_by_every_head_fit_the_target(pair, head, rule):
    target, drafter = pair[0], with_heads(*pair, **HEADS[head])
    counts = sample_texts(target, drafter, seed=0, count=3_000, batch=500, **RULES[rule])
    assert p_value(counts, own_chances(target)) > 1e-3


@torch.no_grad()
def test_the_enumeration_notices_a_missing_residual_step(pair):
    found = chances_of_all_texts(*pair, TreeShape(2, 2, 7), rule=without_residual)
    assert (found - own_chances(pair[0])).abs().max() > 1e-3


@torch.no_grad()
def test_sampling_through_generate_fits_the_target(pair):
    counts = sample_texts(*pair, seed=0, count=400, batch=1)
    # so few samples tell little of a whole text; the first tokens are of a round's tree as well
    starts = [
        texts.unflatten(0, (VOCAB**2, VOCAB)).sum(1) for texts in (counts, own_chances(pair[0]))
    ]
    assert p_value(*starts) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_fifty_thousand_samples_fit_the_target(pair, seed):
    p = p_value(sample_texts(*pair, seed, count=50_000), own_chances(pair[0]))
    print(f"seed {seed}: p = {p:.3f}")
    assert p > 0.01 / len(SEEDS)


@pytest.mark.slow
@torch.no_grad()
def test_fifty_thousand_samples_without_the_residual_step_do_not_fit(pair, monkeypatch):
    monkeypatch.setattr(rules, "token_step", without_residual)
    counts = sample_texts(*pair, SEEDS[0], count=50_000)
    assert p_value(counts, own_chances(pair[0])) < 1e-6


# every way to draft and verify when sampling
RULES = {
    "chosen": {},
    "drawn": {"drawn_tree": True},
    "traversal": {"verification": "traversal"},
    "traversal of a wide tree": {"verification": "traversal", "tree_top_k": 3, "tree_nodes": 13},
    "traversal of a chosen tree": {"verification": "traversal", "drawn_tree": False},
    "block": {"verification": "block", "tree_top_k": 1},
}


def processors():
    warpers = [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)]
    return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), *warpers])


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_samples_of_every_rule_fit_the_target(pair, rule):
    counts = sample_texts(*pair, seed=1, count=5_000, batch=500, **RULES[rule])
    assert p_value(counts, own_chances(pair[0])) > 1e-3


@torch.no_grad()
def test_a_tree_that_was_drawn_from_another_distribution_does_not_fit(pair, monkeypatch):
    drawn = SampledTreeBuilder.build

    def forged(self):
        tree = drawn(self)
        return tree._replace(draft_probs=tree.draft_probs.sqrt())

    monkeypatch.setattr(SampledTreeBuilder, "build", forged)
    counts = sample_texts(*pair, seed=0, count=20_000, batch=500, drawn_tree=True)
    assert p_value(counts, own_chances(pair[0])) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_batches_with_processors_and_every_head_fit_the_target(pair, rule, head):
    target, drafter = pair[0], with_heads(*pair, **HEADS[head])
    counts = sample_texts(target, drafter, SEEDS[0], 20_000, processors(), batch=50, **RULES[rule])
    chances = own_chances(target, processors())
    print(f"{rule}, {head}: p = {p_value(counts, chances):.3f}")
    assert p_value(counts, chances) > 0.01 / len(RULES) / len(HEADS)
