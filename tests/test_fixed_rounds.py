"""Rounds of constant shapes give what rounds that grow give, in every way of running."""

import logging

import pytest
import torch
from conftest import scatter_weights, slowly
from enumerated import p_value
from fixed_calls import (
    COMPILED,
    FAMILIES,
    PLAIN,
    STATIC,
    TREE,
    VOCAB,
    costing,
    drafted,
    pair,
    prompts,
)
from transformers import CompileConfig, StoppingCriteria

import coral_hf
from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.decoding.caches.fixed_cache import FixedCache
from coral_hf.decoding.caches.ragged_cache import RaggedCache
from coral_hf.decoding.rounds import loop as loop_module
from coral_hf.decoding.rounds.loop import capacity_for
from coral_hf.heads.settings import DRAFT_HEADS


@pytest.fixture
def rounds_run(monkeypatch):
    """How many rounds of constant shapes were run."""
    counts = []
    plain = loop_module.FixedLoop.round
    monkeypatch.setattr(
        loop_module.FixedLoop, "round", lambda self: (counts.append(1), plain(self))
    )
    return counts


@pytest.mark.parametrize("rows", [3, *slowly(1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_of_constant_shapes_give_the_tokens_of_a_plain_call(family, rows, rounds_run):
    # the text crosses the sliding windows
    target, drafter = pair(family)
    given = prompts(rows)
    plain = target.generate(**given, **PLAIN)
    ours = drafted(target, drafter, given, **PLAIN, **STATIC)
    assert ours.sequences.equal(plain) and rounds_run
    assert max(ours.stats.round_lengths) > 1  # some was accepted, some rejected
    assert min(ours.stats.round_lengths) < TREE["tree_depth"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_a_compiled_call_gives_the_tokens_of_a_plain_one(rows):
    target, drafter = pair("gemma3")
    given = prompts(rows)
    plain = target.generate(**given, **PLAIN)
    ours = drafted(target, drafter, given, **PLAIN, **COMPILED)
    assert ours.sequences.equal(plain)
    assert ours.stats.warm_up_seconds > 0


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "gpt_oss"),
    ],
)
def test_a_call_compiles_three_graphs_before_its_second_token_and_the_next_none(family):
    torch._dynamo.reset()
    target, drafter = pair(family, dtype=torch.float32)
    settings = {**PLAIN, **COMPILED, "speculation": "adaptive"}
    compiled, before = [], []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    class Streamer:
        def put(self, value):
            before.append(len(compiled))

        def end(self):
            pass

    settings["compile_config"] = CompileConfig(backend=backend)
    drafted(target, drafter, prompts(), streamer=Streamer(), **settings)
    # behind the prompt and the first token
    assert len(compiled) == 3 and before[2:] == [3] * len(before[2:])
    drafted(target, drafter, prompts(length=9), **settings)
    assert len(compiled) == 3


@pytest.mark.slow
def test_shorter_calls_run_in_what_was_compiled_ahead():
    torch._dynamo.reset()
    target, drafter = pair()
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend)
    own = {**PLAIN, "speculation": "always"}
    ahead = {**TREE, **own, "max_new_tokens": None}
    coral_hf.warm_up(target, drafter, max_length=300, compile_config=config, **ahead)
    assert len(compiled) == 2
    plain = target.generate(**prompts(), **PLAIN)
    found = drafted(target, drafter, prompts(), **own, compile_config=config)
    assert found.sequences.equal(plain) and len(compiled) == 2


def test_rows_end_where_they_end_in_a_plain_call(rounds_run):
    target, drafter = pair()
    given = prompts(rows=4)
    for end in range(3, VOCAB):
        settings = {**PLAIN, "eos_token_id": end}
        plain = target.generate(**given, **settings)
        ours = drafted(target, drafter, given, **settings, **STATIC)
        assert ours.sequences.equal(plain)
    assert rounds_run


@pytest.mark.parametrize(
    ("family", "rows"), [("llama", 1), pytest.param("gemma3", 3, marks=pytest.mark.slow)]
)
def test_a_call_continues_from_the_cache_of_one_with_constant_shapes(family, rows):
    target, drafter = pair(family)
    given = prompts(rows)
    whole = target.generate(**given, **PLAIN)
    settings = {**PLAIN, "max_new_tokens": 17}
    first = drafted(target, drafter, given, **settings, **STATIC)
    mask = torch.nn.functional.pad(given["attention_mask"], (0, 17), value=1)
    more = {"input_ids": first.sequences, "attention_mask": mask, CACHE: first[CACHE]}
    settings["max_new_tokens"] = 23
    if rows == 1:
        assert first[CACHE].drafter_memory is not None
    assert drafted(target, drafter, more, **settings, **COMPILED).sequences.equal(whole)
    first = drafted(target, drafter, given, **{**settings, "max_new_tokens": 17}, **STATIC)
    more[CACHE] = first[CACHE]
    assert target.generate(**more, **settings).equal(whole)


@pytest.mark.parametrize("way", [STATIC, pytest.param(COMPILED, marks=pytest.mark.slow)])
def test_a_text_continues_in_the_next_capacity_token_for_token(way, monkeypatch, rounds_run):
    monkeypatch.setattr(loop_module, "LEAST_CAPACITY", 32)
    monkeypatch.setattr(loop_module, "FAR", 8)
    target, drafter = pair("gemma3")
    given, settings = prompts(rows=2), {**PLAIN, "max_new_tokens": 90}
    plain = target.generate(**given, **settings)
    assert drafted(target, drafter, given, **settings, **way).sequences.equal(plain) and rounds_run


def test_capacities_double_and_long_ones_have_one_between():
    lengths = (1, 256, 257, 1000, 1024, 1025, 1536, 1537, 3000, 4144, 16400)
    capacities = [256, 256, 512, 1024, 1024, 1536, 1536, 2048, 3072, 6144, 24576]
    assert [capacity_for(length) for length in lengths] == capacities


@pytest.mark.parametrize("way", [STATIC, pytest.param(COMPILED, marks=pytest.mark.slow)])
def test_a_token_is_read_alone_where_drafting_does_not_pay(way, monkeypatch):
    monkeypatch.setattr(loop_module, "measure_costs", costing(9.0))
    target, drafter = pair()
    given = prompts(rows=2)
    plain = target.generate(**given, **PLAIN)
    ours = drafted(target, drafter, given, **PLAIN, **way, speculation="adaptive")
    assert ours.sequences.equal(plain)
    assert ours.stats.is_stepped_back and ours.stats.num_rounds > len(plain[0]) // 3


def test_giving_up_in_the_next_capacity_keeps_the_tokens(monkeypatch):
    monkeypatch.setattr(loop_module, "measure_costs", costing(9.0))
    monkeypatch.setattr(loop_module, "LEAST_CAPACITY", 32)
    monkeypatch.setattr(loop_module, "FAR", 8)
    target, drafter = pair("gemma3")
    settings = {**PLAIN, **STATIC, "speculation": "adaptive", "max_new_tokens": 90}
    plain = target.generate(**prompts(), **PLAIN | {"max_new_tokens": 90})
    ours = drafted(target, drafter, prompts(), **settings)
    assert ours.sequences.equal(plain) and ours.stats.is_stepped_back


def test_drawn_text_follows_from_its_seed_and_no_clock(monkeypatch):
    monkeypatch.setattr(loop_module, "measure_costs", None)
    target, drafter = pair()
    settings = {**STATIC, "do_sample": True, "speculation": "adaptive", "max_new_tokens": 9}
    assert drafted(target, drafter, prompts(), **settings, pad_token_id=0).stats.num_rounds


def test_the_same_call_drafts_alike_however_long_passes_take():
    target, drafter = pair(dtype=torch.bfloat16)
    settings = {**PLAIN, **STATIC, "speculation": "adaptive"}
    first, *others = (drafted(target, drafter, prompts(), **settings) for _ in range(4))
    for other in others:
        assert other.sequences.equal(first.sequences)
        assert other.stats.round_lengths == first.stats.round_lengths


RULES = [
    {"verification": "token", "drawn_tree": False},
    {"verification": "token", "drawn_tree": True},
    {"verification": "traversal"},
    {"verification": "traversal", "drawn_tree": False},
    {"verification": "block"},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
@pytest.mark.parametrize("way", [STATIC, pytest.param(COMPILED, marks=pytest.mark.slow)])
def test_sampled_tokens_have_the_targets_distribution(way, rule, rounds_run, monkeypatch):
    monkeypatch.setattr(loop_module, "LEAST_CAPACITY", 32)
    target, drafter = pair(dtype=torch.float32)
    ids = prompts()["input_ids"].expand(240, -1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.8, "pad_token_id": 0}
    torch.manual_seed(0)
    settings |= way | rule
    tree = {"tree_depth": 3, "tree_nodes": 10}
    if rule["verification"] != "block":
        tree["tree_top_k"] = 3
    texts = [
        target.generate(**given, assistant_model=drafter, **settings, **tree) for _ in range(8)
    ]
    assert rounds_run
    found = torch.cat(texts)[:, -3:]
    counts = torch.zeros(VOCAB, VOCAB, VOCAB, dtype=torch.float64)
    counts.index_put_(tuple(found.T), torch.ones(len(found), dtype=torch.float64), accumulate=True)
    expected = torch.zeros_like(counts)
    triples = torch.cartesian_prod(*[torch.arange(VOCAB)] * 3)
    whole = torch.cat([ids[:1].expand(len(triples), -1), triples], dim=1)
    with torch.no_grad():
        log_probs = (target(whole).logits[:, -4:-1].double() / 0.8).log_softmax(-1)
    expected = log_probs.gather(2, triples[..., None]).sum((1, 2)).exp()
    assert p_value(counts, expected) > 1e-3


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    target, drafter = pair()
    settings = {**STATIC, "do_sample": True, "max_new_tokens": 30, "pad_token_id": 0}
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(drafted(target, drafter, prompts(), **settings).sequences)
    assert texts[0].equal(texts[1]) and not texts[0].equal(texts[2])


def test_a_distribution_that_is_none_is_an_error():
    target, drafter = pair()
    with torch.no_grad():
        target.lm_head.weight[:] = float("nan")
    settings = {"do_sample": True, "max_new_tokens": 5, "pad_token_id": 0, **STATIC}
    with pytest.raises(RuntimeError, match="nan"):
        drafted(target, drafter, prompts(), **settings)


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"output_scores": True},
        {"stopping_criteria": [Never()]},
    ],
)
def test_what_needs_order_runs_in_rounds_that_grow_and_says_so(settings, caplog, rounds_run):
    target, drafter = pair()
    with caplog.at_level(logging.INFO, logger="coral_hf"):
        drafted(target, drafter, prompts(), **{**PLAIN, **STATIC, **settings})
    assert not rounds_run
    assert "varying shapes" in caplog.text


@pytest.mark.parametrize("window", [None, 9])
def test_a_fixed_cache_sees_what_the_growing_one_sees(window):
    generator = torch.Generator().manual_seed(0)
    grows, counts = RaggedCache([window]), [[1, 3], [2, 1], [4, 4], [1, 2]]

    def states(new):
        return torch.randn(2, 2, new, 4, generator=generator, dtype=torch.float64)

    prompt = states(7)
    grows.set_recording(True)
    grows.begin(2)
    grows.update(prompt, prompt + 1, 0)
    positions = torch.arange(7).repeat(2, 1)
    positions[1] = (positions[1] - 2).clamp(min=-1)
    grows.append(positions)
    start = RaggedCache([window])
    start.set_recording(True)
    start.begin(2)
    start.update(prompt, prompt + 1, 0)
    start.append(positions)
    fixed = FixedCache(start, capacity=32, room=5)
    own = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    for kept in counts:
        new = states(5)
        query = torch.arange(5).expand(2, -1)
        seen = []
        for cache in (grows, fixed):
            mask = cache.mask(cache.position_ids(query), own, torch.float32, window) == 0
            keys, values = cache.update(new, new + 1, 0)
            seen.append(
                [
                    {tuple(key.tolist()) for key in keys[row, 0][mask[row, node]]}
                    for row in range(2)
                    for node in range(5)
                ]
            )
        assert seen[0] == seen[1]
        nodes = torch.tensor([[0, 1, 2, 4], [0, 2, 3, 4]])
        grows.commit(kept, nodes[:, : max(kept)])
        fixed.commit(torch.tensor(kept), nodes)
        assert fixed.next_positions.equal(grows.next_positions)
    back = fixed.grown(grows.lengths)
    assert back.positions.equal(grows.positions) and back.lengths == grows.lengths


@pytest.mark.slow
def test_compiling_ahead_leaves_nothing_to_compile():
    torch._dynamo.reset()
    target, drafter = pair(dtype=torch.float32, num_hidden_layers=1)
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend)
    seconds = coral_hf.warm_up(
        target, drafter, batch_size=2, max_length=100, compile_config=config, **TREE
    )
    count = len(compiled)
    assert count == 2 and seconds > 0
    drafted(target, drafter, prompts(rows=2), **PLAIN, compile_config=config)
    assert len(compiled) == count


@pytest.mark.parametrize("way", [STATIC, pytest.param(COMPILED, marks=pytest.mark.slow)])
def test_chains_run_in_rounds_of_constant_shapes(way, rounds_run):
    target, drafter = pair()
    plain = target.generate(**prompts(rows=2), **PLAIN)
    chain = {"tree_depth": 4, "tree_top_k": 1, "tree_nodes": 5}
    given = {**prompts(rows=2), "assistant_model": drafter}
    assert target.generate(**given, **PLAIN, **chain, **way).equal(plain) and rounds_run


@pytest.mark.parametrize("way", [STATIC, pytest.param(COMPILED, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", [name for name in DRAFT_HEADS if name != "full"])
def test_every_draft_head_is_read_in_rounds_of_constant_shapes(head, way, rounds_run):
    target, drafter = pair(dtype=torch.float32)
    drafter.heads.add_router(4, 2)
    drafter.config.is_router_trained = True
    drafter.heads.add_frequency_head(torch.arange(2, VOCAB))
    scatter_weights(drafter.heads, seed=2)
    drafter = drafter.double()
    target = target.double()
    plain = target.generate(**prompts(rows=2), **PLAIN)
    ours = drafted(target, drafter, prompts(rows=2), **PLAIN, **way, draft_head=head)
    assert ours.sequences.equal(plain) and rounds_run
    assert ours.stats.acceptance_length > 1
