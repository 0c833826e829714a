"""Rounds of constant shapes that fail, are interrupted, or get what they cannot take."""

import pytest
import torch
from fixed_calls import COMPILED, PLAIN, STATIC, drafted, pair, prompts
from transformers import CompileConfig

from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.decoding.rounds.fixed_rounds import FixedRounds
from coral_hf.decoding.rounds.steps import Compiled


@pytest.mark.slow
def test_a_graph_is_checked_once_a_call_and_what_has_changed_is_compiled_again(monkeypatch):
    target, drafter = pair(num_hidden_layers=1)
    checks, plain_call = [], Compiled.__call__

    def counted(self, rounds):
        checks.append(self)
        return plain_call(self, rounds)

    monkeypatch.setattr(Compiled, "__call__", counted)

    def assert_right():
        checks.clear()
        plain = target.generate(**prompts(), **PLAIN)
        ours = drafted(target, drafter, prompts(), **PLAIN, **COMPILED, speculation="always")
        assert ours.sequences.equal(plain) and ours.stats.num_rounds > 2
        return len(checks)

    assert assert_right() == 2  # two steps
    assert assert_right() == 2
    target.lm_head.weight = torch.nn.Parameter(target.lm_head.weight.flip(0).clone())
    assert assert_right() >= 2
    target.model.layers[0].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    assert assert_right() >= 2


def test_a_target_that_cannot_be_traced_runs_as_it_is_and_says_so_once(caplog):
    target, drafter = pair(num_hidden_layers=1)
    plain = target.generate(**prompts(), **PLAIN)

    def broken(graph, example_inputs):
        raise RuntimeError("this backend compiles nothing")

    settings = {**PLAIN, "compile_config": CompileConfig(backend=broken)}
    for _ in range(2):
        assert drafted(target, drafter, prompts(), **settings).sequences.equal(plain)
    assert caplog.text.count("cannot be compiled") == 2  # of each step that it runs, once


def test_an_interrupted_round_leaves_target_and_drafter_usable(monkeypatch):
    target, drafter = pair(num_hidden_layers=1)
    plain = target.generate(**prompts(), **PLAIN)
    whole, calls = FixedRounds._accept, []

    def interrupted(self, tree):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(self, tree)

    monkeypatch.setattr(FixedRounds, "_accept", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drafted(target, drafter, prompts(), **PLAIN, **STATIC)
    assert drafted(target, drafter, prompts(), **PLAIN, **STATIC).sequences.equal(plain)
    assert drafted(target, drafter, prompts(), **PLAIN).sequences.equal(plain)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no"),
        *(pytest.param(one("no"), marks=pytest.mark.slow) for one in (RuntimeError, OSError)),
    ],
)
def test_a_step_that_does_not_compile_runs_as_it_is_beside_one_that_does(error, caplog):
    torch._dynamo.reset()
    target, drafter = pair(num_hidden_layers=1)
    plain = target.generate(**prompts(), **PLAIN)
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        if len(compiled) == 2:
            raise error
        return graph.forward

    settings = {**PLAIN, "compile_config": CompileConfig(backend=backend)}
    for _ in range(2):
        ours = drafted(target, drafter, prompts(), **settings, speculation="always")
        assert ours.sequences.equal(plain)
    assert len(compiled) == 2 and caplog.text.count("`verify` of a round cannot be compiled") == 1


@pytest.mark.slow
def test_an_interrupted_graph_leaves_target_and_drafter_usable():
    torch._dynamo.reset()
    target, drafter = pair(num_hidden_layers=1)
    plain = target.generate(**prompts(), **PLAIN)
    runs = []

    def backend(graph, example_inputs):
        def run(*args):
            runs.append(1)
            if len(runs) == 11:
                raise KeyboardInterrupt
            return graph.forward(*args)

        return run

    settings = {**PLAIN, "compile_config": CompileConfig(backend=backend), "speculation": "always"}
    with pytest.raises(KeyboardInterrupt):
        drafted(target, drafter, prompts(), **settings)
    for way in (settings, {**PLAIN, **STATIC}, PLAIN):
        assert drafted(target, drafter, prompts(), **way).sequences.equal(plain)


@pytest.mark.slow
def test_a_compiler_that_is_interrupted_compiles_in_the_next_call():
    torch._dynamo.reset()
    target, drafter = pair(num_hidden_layers=1)
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        if len(compiled) == 2:
            raise KeyboardInterrupt
        return graph.forward

    settings = {**PLAIN, "compile_config": CompileConfig(backend=backend), "speculation": "always"}
    with pytest.raises(KeyboardInterrupt):
        drafted(target, drafter, prompts(), **settings)
    plain = target.generate(**prompts(), **PLAIN)
    assert drafted(target, drafter, prompts(), **settings).sequences.equal(plain)
    assert len(compiled) == 3


@pytest.mark.parametrize("way", [STATIC, pytest.param(COMPILED, marks=pytest.mark.slow)])
def test_a_capacity_beyond_the_positions_of_a_target_is_cut(way):
    target, drafter = pair("gpt2", n_positions=48)
    given, settings = (
        prompts(rows=2),
        PLAIN | {"max_new_tokens": 49 - prompts()["input_ids"].shape[1]},
    )
    plain = target.generate(**given, **settings)
    assert plain.shape[1] == 49
    assert drafted(target, drafter, given, **settings, **way).sequences.equal(plain)


@pytest.mark.parametrize("way", [{}, COMPILED], ids=["growing", "compiled"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_of_another_number_of_rows_is_refused(rows, way):
    target, drafter = pair(num_hidden_layers=1)
    first = drafted(target, drafter, prompts(rows=2), **PLAIN, **STATIC)
    ids = first.sequences[:1].expand(rows, -1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: first[CACHE]}
    with pytest.raises(ValueError, match=f"holds 2 rows, but `input_ids` has {rows}"):
        drafted(target, drafter, given, **PLAIN, **way)
