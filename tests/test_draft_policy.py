"""How much is drafted follows what it costs and gives; the tokens are the target's own."""

import random
import time

import pytest
import torch
from conftest import VOCAB, as_drafter, noted_passes, scatter_weights, slowly, tiny_target
from test_generate import TheTargetItself

from coral_hf import CoralDrafter
from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.decoding.drafting import TreeShape
from coral_hf.decoding.plain import draft_policy
from coral_hf.decoding.plain.costs import (
    PROBES,
    CostModel,
    Costs,
    DecayedLine,
    RoundSample,
)
from coral_hf.decoding.plain.draft_policy import (
    PATIENCE,
    SPREADS,
    AdaptiveDraft,
    choose_speculation,
)
from coral_hf.drafters.tree_builders import TreeBuilder

SHAPE = TreeShape(depth=4, top_k=3, nodes=20)
PROMPT = torch.tensor([[5, 9, 3, 17, 22, 8]])


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", eos_token_id=None)


@pytest.fixture(scope="module")
def drafter(target):
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(drafter, seed=1)
    return drafter


def rounds(policy, count, tokens, levels=2, nodes=6, seconds=(0.0, 0.0, 0.0)):
    """Report rounds to a policy that all gave as much; returns the planned depths."""
    depths = []
    for _ in range(count):
        depths.append(policy.plan(1).depth)
        drafted = (levels, nodes) if depths[-1] else (0, 1)
        policy.note(RoundSample(1, *drafted, tokens, *seconds))
    return depths


# ---- decisions from stored costs


def test_a_drafter_that_never_hits_is_given_up_after_the_patience_is_spent():
    policy = AdaptiveDraft(SHAPE, CostModel(Costs(base=1.0, level=0.5, node=0.0)))
    assert rounds(policy, int(PATIENCE), tokens=1) == [4, 4]  # each loses one plain pass
    assert not policy.is_plain
    assert rounds(policy, 1, tokens=1) == [4] and policy.is_plain


def test_a_drafter_that_pays_is_never_given_up():
    policy = AdaptiveDraft(SHAPE, CostModel(Costs(base=1.0, level=0.5, node=0.0)))
    assert rounds(policy, 50, tokens=2.1) == [4] * 50


def test_what_was_gained_before_does_not_pay_for_what_is_lost_now():
    policy = AdaptiveDraft(SHAPE, CostModel(Costs(base=1.0, level=0.5, node=0.0)))
    rounds(policy, 50, tokens=5)
    rounds(policy, 30, tokens=1)
    assert policy.is_plain


def test_a_few_unlucky_rounds_are_no_reason_to_step_back():
    policy = AdaptiveDraft(SHAPE, CostModel(Costs(base=1.0, level=0.5, node=0.0)))
    rounds(policy, 50, tokens=5)
    rounds(policy, 5, tokens=1)
    assert not policy.is_plain


@pytest.mark.parametrize("spreads", [0.0, SPREADS])
def test_a_drafter_that_pays_is_kept_although_its_rounds_vary(monkeypatch, spreads):
    monkeypatch.setattr(draft_policy, "SPREADS", spreads)
    policy = AdaptiveDraft(SHAPE, CostModel(Costs(base=1.8, level=0.0, node=0.0)))
    for _ in range(20):  # 2 tokens a round
        rounds(policy, 1, tokens=13)
        rounds(policy, 11, tokens=1)
    assert policy.is_plain == (spreads == 0)


def test_nodes_and_levels_must_be_worth_what_they_cost():
    policy = AdaptiveDraft(SHAPE, CostModel(Costs(base=1.0, level=0.2, node=0.05)))
    assert policy.plan(1) == SHAPE._replace(node_floor=0.05, level_floor=0.2)
    rounds(policy, 100, tokens=4, levels=2, nodes=13)  # 2 plain passes for 4 tokens
    plan = policy.plan(1)
    assert plan.node_floor == pytest.approx(0.1, rel=1e-3)
    assert plan.level_floor == pytest.approx(0.4, rel=1e-3)


# ---- costs from a clock


def test_costs_are_measured_in_plain_passes(target):
    costs_of = CostModel(Costs(), tiny_target("llama"))
    for _ in range(PROBES):
        assert costs_of.lacks_plain(1)
        costs_of.note(RoundSample(1, 0, 1, 1.0, 0.0, 0.010, 0.5))
    for step in range(200):
        nodes = 1 + step % 20
        costs_of.note(RoundSample(1, 3, nodes, 1.0, 0.006, 0.011 + 0.0003 * (nodes - 1), 0.001))
    assert costs_of.costs(1) == pytest.approx((1.2, 0.2, 0.03), rel=0.25)
    assert costs_of.lacks_plain(2)


def test_a_line_without_spread_keeps_its_assumed_slope():
    line = DecayedLine(slope_before=0.5)
    for _ in range(20):
        line.add(4, 3.0)
    assert line.slope == pytest.approx(0.5) and line.at_zero(0) == pytest.approx(1.0)


def test_a_machine_that_slows_down_is_no_reason_to_step_back():
    policy = AdaptiveDraft(SHAPE, CostModel(Costs(), tiny_target("llama")))
    rounds(policy, PROBES, tokens=1, seconds=(0.0, 0.01, 0.0))
    rounds(policy, 5, tokens=2.5, seconds=(0.0, 0.011, 0.0))
    for _ in range(60):
        is_plain_round = policy.plan(1).depth == 0
        rounds(policy, 1, tokens=1 if is_plain_round else 2.5, seconds=(0.0, 0.04, 0.0))
    assert not policy.is_plain


def test_plain_passes_that_were_measured_when_the_machine_was_slow_are_corrected():
    policy = AdaptiveDraft(SHAPE, CostModel(Costs(), tiny_target("llama")))
    rounds(policy, PROBES, tokens=1, seconds=(0.0, 0.03, 0.0))
    rounds(policy, 14, tokens=1, seconds=(0.002, 0.01, 0.001))  # no token beside a plain pass's
    rounds(policy, PROBES, tokens=1, seconds=(0.0, 0.01, 0.0))
    assert policy.is_plain


def test_measured_costs_are_remembered_from_call_to_call():
    model = tiny_target("llama")
    rounds(AdaptiveDraft(SHAPE, CostModel(Costs(), model)), PROBES, 1, seconds=(0.0, 0.01, 0.0))
    assert AdaptiveDraft(SHAPE, CostModel(Costs(), model)).plan(1).depth == SHAPE.depth


def test_an_unknown_speculation_is_refused(target, drafter):
    with pytest.raises(ValueError, match="`speculation` is 'sometimes'"):
        choose_speculation("sometimes")


# ---- trees


def grow(shape):
    """Two levels of two nodes; the paths below the root: 0.5, 0.25, then 0.25, 0.125, …"""
    builder, half = TreeBuilder(torch.tensor([0]), shape), torch.tensor([[[0.5, 0.25]]]).log()
    beam = builder.add_level(torch.tensor([[[1, 2]]]), half)
    is_worth_more = beam.is_worth(shape.level_floor)
    builder.add_level(torch.tensor([[[3, 4], [5, 6]]]), half.expand(1, 2, 2))
    return builder.build(), is_worth_more


def test_nodes_below_the_floor_are_left_out_and_the_rest_is_a_tree():
    tree, _ = grow(TreeShape(2, 2, 7, node_floor=0.2))
    assert tree.tokens.tolist() == [[0, 1, 2, 3]]
    assert tree.parents.tolist() == [[0, 0, 0, 1]]
    assert tree.levels == 2


def test_a_level_is_drafted_while_its_beam_is_likely_enough():
    assert grow(TreeShape(2, 2, 7, level_floor=0.7))[1]
    assert not grow(TreeShape(2, 2, 7, level_floor=0.8))[1]


# ---- calls


def generate(target, drafter, prompt=PROMPT, **settings):
    settings = {
        "do_sample": False,
        "max_new_tokens": 60,
        "return_dict_in_generate": True,
    } | settings
    mask = (prompt != 0).long()
    return target.generate(prompt, attention_mask=mask, assistant_model=drafter, **settings)


def test_an_untrained_drafter_is_left_alone_after_a_while(target, drafter, monkeypatch):
    calls = []
    hook = drafter.register_forward_hook(lambda *_: calls.append(1))
    costly = {"base": 1.0, "level": 1.0, "node": 0.0}
    monkeypatch.setattr(drafter.generation_config, "draft_costs", costly, raising=False)
    out = generate(target, drafter, speculation="adaptive", do_sample=True)
    hook.remove()
    assert out.stats.is_stepped_back
    assert len(calls) < 20 and out.sequences.shape[1] == 66
    assert out[CACHE].drafter_memory is None


def test_a_drafter_that_knows_the_text_keeps_drafting(target, drafter, monkeypatch):
    text = target.generate(PROMPT, do_sample=False, max_new_tokens=60)
    drafting = TheTargetItself(text)
    measured = "coral_hf.decoding.plain.draft_policy.CostModel"
    monkeypatch.setattr(measured, lambda costs, *_: CostModel(costs))
    out = target.generate(
        PROMPT,
        do_sample=False,
        max_new_tokens=60,
        assistant_model=as_drafter(drafting),
        speculation="adaptive",
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, text)
    assert not out.stats.is_stepped_back and out.stats.acceptance_length > 5


def test_forced_speculation_never_steps_back(target, drafter):
    out = generate(target, drafter, speculation="always", tree_depth=2, tree_nodes=5)
    assert not out.stats.is_stepped_back
    # the last round has no room for a draft
    assert out.stats.num_levels >= 2 * (out.stats.num_rounds - 2)


def test_speculation_can_be_left_out(target, drafter):
    hook = drafter.register_forward_hook(lambda *_: pytest.fail("the drafter was called"))
    out = generate(target, drafter, speculation="never")
    hook.remove()
    plain = target.generate(PROMPT, do_sample=False, max_new_tokens=60)
    assert torch.equal(out.sequences, plain) and out.stats.num_levels == 0


@pytest.mark.parametrize("speculation", ["adaptive", "always", "never"])
@pytest.mark.parametrize("rows", [3, *slowly(1)])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gpt2"])
def test_tokens_are_the_targets_own_under_any_policy(speculation, rows, family):
    target = tiny_target(family)
    target.generation_config.pad_token_id = 0
    drafter = CoralDrafter.from_target(target).eval()
    prompts = torch.randint(3, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(0))
    prompts[1:, 0] = 0  # padding
    settings = {"attention_mask": (prompts != 0).long(), "do_sample": False, "max_new_tokens": 40}
    plain = target.generate(prompts, **settings)
    out = generate(target, drafter, prompts, speculation=speculation, max_new_tokens=40)
    assert torch.equal(out.sequences, plain)


def test_a_text_continues_after_a_call_that_was_decoded_plainly(target, drafter):
    first = generate(target, drafter, speculation="never", max_new_tokens=10)
    plain = target.generate(PROMPT, do_sample=False, max_new_tokens=30)
    second = generate(
        target,
        drafter,
        first.sequences,
        **{CACHE: first[CACHE]},
        max_new_tokens=20,
    )
    assert torch.equal(second.sequences, plain)


def test_a_seed_gives_the_same_sample_whatever_the_clock_says(target, drafter, monkeypatch):
    texts = []
    for seed in (0, 1):
        chance = random.Random(seed)
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda chance=chance: 100 * chance.random())
            torch.manual_seed(3)
            texts.append(generate(target, drafter, do_sample=True, speculation="adaptive"))
    assert torch.equal(texts[0].sequences, texts[1].sequences)
    assert texts[0].stats.num_nodes == texts[1].stats.num_nodes


def test_a_call_without_adaptive_drafting_has_no_further_pass():
    target, passes = tiny_target("llama"), []
    drafter = CoralDrafter.from_target(target).eval()
    with noted_passes(target, lambda *_: passes.append(1)):
        output = generate(target, drafter, speculation="always", pad_token_id=0)
    assert len(passes) == output.stats.num_rounds + 1
