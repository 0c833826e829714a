"""Every family of drafters changes no token: the same tests for each, in every way of running."""

import logging

import pytest
import torch
from bigram import BigramDrafter
from conftest import scatter_weights, slowly, tiny_target
from enumerated import TINY, chances_of_all_texts, own_chances, p_value, sample_texts
from transformers import AutoModelForCausalLM, CompileConfig

from coral_hf import (
    CoralDrafter,
    Eagle3Drafter,
    LanguageModelDrafter,
    MedusaDrafter,
    ParallelDrafter,
    RecurrentDrafter,
)
from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.decoding.drafting import TreeShape
from coral_hf.decoding.rounds import loop as fixed_loop

PLAIN = {"do_sample": False, "max_new_tokens": 32, "pad_token_id": 0}
TREE = {"tree_depth": 4, "tree_top_k": 3, "tree_nodes": 12}
CHAIN = {"tree_depth": 4, "tree_top_k": 1, "tree_nodes": 5}
WAYS = {
    "growing": {},
    "static": {"cache_implementation": "static"},
    "compiled": {"compile_config": CompileConfig(backend="eager")},
}
SOME_WAYS = ["growing", "static", pytest.param("compiled", marks=pytest.mark.slow)]


def coral(target):
    return CoralDrafter.from_target(target)


def bigram(target):
    size = target.config.vocab_size
    texts = torch.randint(size, (4, 60), generator=torch.Generator().manual_seed(2))
    return BigramDrafter.from_texts(texts, vocab_size=size, top_k=3)


def eagle3(target):
    """With a part of the vocabulary, so that most of it is never drafted."""
    size = target.config.vocab_size
    drafter = Eagle3Drafter.from_target(target, draft_vocab_size=size * 3 // 4)
    drafter.set_draft_vocabulary(torch.arange(size)[size // 4 :].flip(0))
    return drafter


def eagle3_1(target):
    return Eagle3Drafter.from_target(target, fc_norm=True, norm_output=True, has_embeddings=True)


def eagle3_routed(target):
    """With half of the groups of its LM head read, in an order of their own."""
    size = target.config.vocab_size
    drafter = Eagle3Drafter.from_target(target)
    drafter.heads.add_router(4, 2, torch.arange(size).roll(1).flip(0))
    drafter.heads.configure(is_router_trained=True, draft_head="routed")
    return drafter


def parallel(target):
    """With two layers, so that a mask reads what another mask has read."""
    size = target.config.vocab_size
    drafter = ParallelDrafter.from_target(target, num_hidden_layers=2, draft_vocab_size=size - 1)
    drafter.set_draft_vocabulary(torch.arange(1, size))
    return drafter


def recurrent(target):
    return RecurrentDrafter.from_target(target)


def language_model(target):
    """Smaller than the target, and with other weights."""
    size = target.config.vocab_size
    return LanguageModelDrafter(tiny_target("llama", vocab_size=size, num_hidden_layers=1))


def medusa(target):
    return MedusaDrafter.from_target(target, num_heads=4)


def medusa_shared(target):
    """Heads that share the target's LM head."""
    return MedusaDrafter.from_target(target, num_heads=4, has_lm_heads=False)


SHARED, ROUTED = "medusa, shared", "eagle3, routed"
FAMILIES = {
    "coral": coral,
    "bigram": bigram,
    "eagle3": eagle3,
    "eagle3.1": eagle3_1,
    ROUTED: eagle3_routed,
    "parallel": parallel,
    "recurrent": recurrent,
    "language_model": language_model,
    "medusa": medusa,
    SHARED: medusa_shared,
}
# a bigram tree follows from its root: there is nothing to compile, and it has no other rounds
FIXED = [family for family in FAMILIES if family != "bigram"]
# each round reads one feature anew; two of their rules are slow tests, others draw by the same
FORGETTING = ["medusa", SHARED, "recurrent"]
# they have a cache of their own, which a later call continues
REMEMBERING = [family for family in FIXED if family not in FORGETTING]
# they are saved as drafters
SAVED = [family for family in FIXED if family != "language_model"]


def each(families, *quick):
    """Families as parameters, slow where others ask nearly the same, but for `quick`."""
    slow = {SHARED, ROUTED} - {*quick}
    return [pytest.param(one, marks=pytest.mark.slow) if one in slow else one for one in families]


def pair(family, **overrides):
    target = tiny_target("llama", **{"vocab_size": 8, **overrides})
    torch.manual_seed(0)
    drafter = FAMILIES[family](target).eval()
    scatter_weights(drafter, seed=1)
    return target, drafter


def prompts(rows=3, length=9):
    ids = torch.randint(3, 8, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def drafted(target, drafter, given, **settings):
    keep = {"return_dict_in_generate": True, "speculation": "always"}
    return target.generate(**given, assistant_model=drafter, **{**TREE, **keep, **settings})


@pytest.fixture
def fixed_rounds(monkeypatch):
    """How many rounds of constant shapes were run."""
    counts, plain = [], fixed_loop.FixedLoop.round
    monkeypatch.setattr(fixed_loop.FixedLoop, "round", lambda own: (counts.append(1), plain(own)))
    return counts


@pytest.mark.parametrize("way", SOME_WAYS)
@pytest.mark.parametrize("shape", [TREE, *slowly(CHAIN)], ids=["tree", "chain"])
@pytest.mark.parametrize("family", each(FAMILIES, ROUTED))
def test_greedy_tokens_of_a_batch_are_the_targets_own(family, shape, way, fixed_rounds):
    target, drafter = pair(family)
    given = prompts()
    plain = target.generate(**given, **PLAIN)
    ours = drafted(target, drafter, given, **PLAIN, **WAYS[way], **shape)
    assert ours.sequences.equal(plain)
    assert max(ours.stats.round_lengths) > 1  # some was accepted, some rejected
    assert min(ours.stats.round_lengths) < TREE["tree_depth"] + 1
    assert bool(fixed_rounds) == (way != "growing" and family in FIXED)


@pytest.mark.parametrize("way", ["growing", "static"])
@pytest.mark.parametrize("family", each(FAMILIES))
def test_rows_end_where_they_end_in_a_plain_call(family, way):
    target, drafter = pair(family)
    given = prompts()
    for end in (4, 6):
        settings = {**PLAIN, "eos_token_id": end}
        plain = target.generate(**given, **settings)
        assert drafted(target, drafter, given, **settings, **WAYS[way]).sequences.equal(plain)


@pytest.mark.parametrize("way", ["growing", "static"])
@pytest.mark.parametrize("rows", [3, *slowly(1)])
@pytest.mark.parametrize("family", each(FAMILIES))
def test_a_call_continues_from_the_cache_of_another(family, rows, way):
    target, drafter = pair(family)
    given = prompts(rows)
    whole = target.generate(**given, **PLAIN)
    first = drafted(target, drafter, given, **{**PLAIN, "max_new_tokens": 13}, **WAYS[way])
    mask = torch.nn.functional.pad(given["attention_mask"], (0, 13), value=1)
    more = {"input_ids": first.sequences, "attention_mask": mask, CACHE: first[CACHE]}
    if rows == 1:
        assert (first[CACHE].drafter_memory is not None) == (family in REMEMBERING)
    ours = drafted(target, drafter, more, **{**PLAIN, "max_new_tokens": 19})
    assert ours.sequences.equal(whole)


@pytest.mark.parametrize("family", each(SAVED))
def test_a_prompt_in_parts_and_a_short_memory_change_no_token(family):
    target, drafter = pair(family)
    given = prompts(length=50)
    plain = target.generate(**given, **PLAIN)
    whole = drafted(target, drafter, given, **PLAIN)
    parts = drafted(target, drafter, given, **PLAIN, prefill_chunk_size=20)
    assert parts.stats.round_lengths == whole.stats.round_lengths
    assert parts.sequences.equal(plain)
    if family in REMEMBERING:
        assert drafted(target, drafter, given, **PLAIN, draft_window=32).sequences.equal(plain)


@pytest.mark.parametrize(
    "shape", [TreeShape(2, 2, 7), *slowly(TreeShape(2, 1, 3), TreeShape(1, 4, 5))], ids=str
)
@pytest.mark.parametrize("family", each(FAMILIES, ROUTED))
@torch.no_grad()
def test_the_distribution_of_the_output_is_exactly_the_targets(family, shape):
    target, drafter = pair(family, **TINY)
    found, own = chances_of_all_texts(target, drafter, shape), own_chances(target)
    torch.testing.assert_close(found, own, rtol=0, atol=1e-9)


RULES = {
    "chosen": {"verification": "token", "drawn_tree": False},
    "drawn": {"drawn_tree": True},
    "traversal": {"verification": "traversal"},
    "block": {"verification": "block", "tree_top_k": 1},
}
# what else runs with the slow tests: trees of all families are enumerated above
QUICK = {"coral": RULES, **dict.fromkeys(FORGETTING, ("chosen", "drawn"))}


@pytest.mark.parametrize("way", ["growing", pytest.param("static", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "rule"),
    [
        pytest.param(
            one, rule, marks=[pytest.mark.slow] * (rule not in QUICK.get(one, ("traversal",)))
        )
        for one in FAMILIES
        for rule in RULES
        if rule == "chosen" or one in FIXED
    ],
)
@torch.no_grad()
def test_samples_fit_the_targets_distribution(family, rule, way):
    target, drafter = pair(family, **TINY)
    settings = {**RULES[rule], **WAYS[way], "pad_token_id": 0}
    counts = sample_texts(target, drafter, seed=1, count=2_000, batch=500, **settings)
    assert p_value(counts, own_chances(target)) > 1e-3


@pytest.mark.parametrize("family", each(SAVED, ROUTED))
def test_a_saved_drafter_drafts_the_same_rounds(family, tmp_path, caplog):
    target, drafter = pair(family)
    drafter.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    rounds = [drafted(target, one, prompts(), **PLAIN) for one in (drafter, loaded)]
    assert rounds[0].stats.round_lengths == rounds[1].stats.round_lengths
    assert not caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("shape", [TREE, CHAIN], ids=["tree", "chain"])
@pytest.mark.parametrize("family", FIXED)
def test_greedy_tokens_are_the_targets_own_when_inductor_compiles(family, shape):
    target, drafter = pair(family)
    given = prompts(rows=2)
    plain = target.generate(**given, **PLAIN)
    settings = {**PLAIN, **shape, "compile_config": CompileConfig()}
    assert drafted(target, drafter, given, **settings).sequences.equal(plain)
