"""Sizes of tree in adaptive rounds of constant shapes, and drafts that are launched ahead."""

import pytest
import torch
from fixed_calls import PLAIN, STATIC, TREE, costing, drafted, pair, prompts
from transformers import CompileConfig

import coral_hf
from coral_hf.decoding.drafting import TreeShape
from coral_hf.decoding.plain.costs import Costs, RoundSample
from coral_hf.decoding.plain.draft_policy import RungDraft, ladder
from coral_hf.decoding.rounds import loop as loop_module
from coral_hf.decoding.rounds.steps import Steps


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_adaptive_rounds_have_trees_of_a_few_sizes(family, monkeypatch):
    monkeypatch.setattr(loop_module, "measure_costs", costing(0.5, 0.05, 0.1))
    target, drafter = pair(family)
    given = prompts(rows=2)
    plain = target.generate(**given, **PLAIN)
    settings = {**PLAIN, **STATIC, "speculation": "adaptive"}
    ours = [drafted(target, drafter, given, **settings) for _ in range(2)]
    sizes = {shape.nodes * 1.0 for shape in ladder(TreeShape(4, 3, 12))}
    assert ours[0].sequences.equal(plain) and not ours[0].stats.is_stepped_back
    mean = ours[0].stats.num_nodes / ours[0].stats.num_rounds
    assert mean not in sizes and min(sizes) < mean < max(sizes)  # several of them
    assert ours[0].stats.num_nodes == ours[1].stats.num_nodes


@pytest.mark.slow
def test_compiled_calls_draft_the_sizes_that_were_compiled_ahead(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(loop_module, "measure_costs", costing(0.5, 0.02, 0.05))
    target, drafter = pair(dtype=torch.float32, num_hidden_layers=1)
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend)
    settings = {**PLAIN, "compile_config": config, "speculation": "adaptive"}
    first = drafted(target, drafter, prompts(), **settings)
    assert len(compiled) == 3 and first.stats.num_nodes == 12 * first.stats.num_rounds
    ahead = {"num_sizes": 2, "speculation": "adaptive", **TREE}
    coral_hf.warm_up(target, drafter, 1, 100, config, **ahead)
    assert len(compiled) == 5
    second = drafted(target, drafter, prompts(), **settings)
    assert len(compiled) == 5 and second.stats.num_nodes < 12 * second.stats.num_rounds
    assert second.stats.warm_up_seconds == 0 and second.sequences.equal(first.sequences)
    with pytest.raises(ValueError, match="`num_sizes` is 4; use 1 to 3"):
        coral_hf.warm_up(target, drafter, num_sizes=4)


def test_trees_of_a_ladder_are_halved():
    assert ladder(TreeShape(6, 8, 32)) == [(6, 8, 32, 0, 0), (5, 4, 16, 0, 0), (4, 2, 8, 0, 0)]
    assert [shape.nodes for shape in ladder(TreeShape(4, 1, 5))] == [5, 4, 3]
    assert len(ladder(TreeShape(1, 3, 4))) == 1


def sizes_of(policy, gives, rounds=60):
    """The nodes of each round's tree, where a tree `gives` so many tokens."""
    sizes = []
    for _ in range(rounds):
        shape = policy.plan(1)
        sizes.append(shape.nodes)
        policy.note(RoundSample(1, shape.depth, shape.nodes, gives[shape.nodes]))
    return sizes


@pytest.mark.parametrize(
    ("gives", "best"),
    [({32: 2, 16: 2, 8: 2}, 8), ({32: 6, 16: 3, 8: 2}, 32), ({32: 5, 16: 5, 8: 2.5}, 16)],
)
def test_the_size_that_gives_most_for_its_cost_is_drafted(gives, best):
    policy = RungDraft(ladder(TreeShape(6, 8, 32)), Costs(1.0, 0.05, 0.02))
    sizes = sizes_of(policy, gives)
    assert sizes.count(best) > 50 and not policy.is_plain


def test_a_size_that_has_waited_is_tried_again():
    policy = RungDraft(ladder(TreeShape(6, 8, 32)), Costs(1.0, 0.05, 0.02))
    sizes_of(policy, {32: 2, 16: 2, 8: 2})
    assert sizes_of(policy, {32: 7, 16: 2, 8: 2}, 150)[-20:].count(32) > 15


def test_drawn_text_follows_from_its_seed_and_no_clock(monkeypatch):
    monkeypatch.setattr(loop_module, "measure_costs", None)
    target, drafter = pair()
    settings = {**STATIC, "do_sample": True, "speculation": "adaptive", "max_new_tokens": 9}
    assert drafted(target, drafter, prompts(), **settings, pad_token_id=0).stats.num_rounds


@pytest.mark.parametrize(
    ("speculation", "sampling"), [("always", {}), ("always", {"do_sample": True}), ("adaptive", {})]
)
def test_the_next_draft_is_launched_before_a_round_is_read(speculation, sampling, monkeypatch):
    # as on a device that works by itself
    given, settings = prompts(rows=3), {**PLAIN, **STATIC, **sampling, "speculation": speculation}
    target, drafter = pair()
    monkeypatch.setattr(loop_module, "measure_costs", costing(0.5, 0.05, 0.1))
    torch.manual_seed(0)
    expected = drafted(target, drafter, given, **settings, eos_token_id=5)
    order, run, begin = [], Steps.run, loop_module.FixedLoop.begin_rounds

    def ahead(self):
        begin(self)
        self.drafts_ahead = True
        order.clear()

    def noted(self, name, rounds):
        order.append(name)
        return run(self, name, rounds)

    read = loop_module.HostCopy.read
    monkeypatch.setattr(loop_module.FixedLoop, "begin_rounds", ahead)
    monkeypatch.setattr(Steps, "run", noted)
    monkeypatch.setattr(
        loop_module.HostCopy, "read", lambda self: (order.append("read"), read(self))[1]
    )
    torch.manual_seed(0)
    found = drafted(target, drafter, given, **settings, eos_token_id=5)
    assert order == ["draft", *["verify", "draft", "read"] * found.stats.num_rounds]
    if speculation == "always":  # the policy looks at what was read, and may draft another size
        assert found.sequences.equal(expected.sequences)
    else:
        assert found.sequences.equal(target.generate(**given, **PLAIN, eos_token_id=5))


def test_giving_up_while_a_draft_is_under_way_keeps_the_tokens(monkeypatch):
    monkeypatch.setattr(loop_module, "measure_costs", costing(9.0))
    begin = loop_module.FixedLoop.begin_rounds

    def ahead(self):
        begin(self)
        self.drafts_ahead = True

    monkeypatch.setattr(loop_module.FixedLoop, "begin_rounds", ahead)
    monkeypatch.setattr(loop_module, "LEAST_CAPACITY", 32)
    monkeypatch.setattr(loop_module, "FAR", 8)
    target, drafter = pair("gemma3")
    settings = {**PLAIN, **STATIC, "speculation": "adaptive", "max_new_tokens": 90}
    plain = target.generate(**prompts(), **PLAIN | {"max_new_tokens": 90})
    ours = drafted(target, drafter, prompts(), **settings)
    assert ours.sequences.equal(plain) and ours.stats.is_stepped_back
