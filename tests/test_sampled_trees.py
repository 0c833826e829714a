"""Drawn trees: their shape is planned, their siblings are draws without replacement from q."""

import itertools

import pytest
import torch
from conftest import VOCAB, scatter_weights, tiny_target
from transformers import SynthIDTextWatermarkingConfig

from coral_hf import CoralDrafter
from coral_hf.decoding.chance import Uniforms
from coral_hf.decoding.drafting import PADDING, TreeShape
from coral_hf.drafters.tree_builders import Level, SampledTreeBuilder, plan_levels

PROMPT = torch.tensor([[5, 9, 3, 17, 22]])
TREE = {"tree_depth": 3, "tree_top_k": 2, "tree_nodes": 15}


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float32)


@pytest.fixture(scope="module")
def drafter(target):
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(drafter, seed=1)
    return drafter


# ---- the plan


@pytest.mark.parametrize(
    ("shape", "levels"),
    [
        (TreeShape(4, 1, 5), [(1, 1)] * 4),
        (TreeShape(4, 2, 31), [(1, 2), (2, 2), (4, 2), (8, 2)]),
        (TreeShape(5, 4, 21), [(1, 4)] * 5),
        (TreeShape(3, 4, 7), [(1, 2)] * 3),
        (TreeShape(3, 2, 3), [(1, 1), (1, 1)]),
        (TreeShape(2, 3, 2), [(1, 1)]),
    ],
)
def test_each_level_takes_its_share_of_the_nodes_in_whole_families(shape, levels):
    assert plan_levels(shape) == [Level(*level) for level in levels]


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("top_k", [1, 2, 7])
@pytest.mark.parametrize("nodes", [2, 3, 8, 33, 60])
def test_a_plan_never_has_more_nodes_than_it_may(depth, top_k, nodes):
    levels = plan_levels(TreeShape(depth, top_k, nodes))
    assert sum(level.families * level.children for level in levels) < nodes
    assert 1 <= len(levels) <= depth


# ---- the draws


def drawn_before(nodes: int, batch: int) -> Uniforms:
    """Numbers that are there before a round, as those of constant shapes have them."""
    numbers = Uniforms(batch, 0, nodes, torch.device("cpu"))
    numbers.draw_all()
    return numbers


CHANCES = pytest.mark.parametrize("chance", [None, drawn_before], ids=["at once", "before"])


def draw_families(probs: torch.Tensor, children: int, batch: int, seed: int = 0, chance=None):
    torch.manual_seed(seed)
    source = chance and chance(children, batch)
    builder = SampledTreeBuilder(torch.zeros(batch, dtype=torch.long), source)
    builder.best(1)
    builder.draw(probs.expand(batch, 1, -1).clone(), children)
    return builder


@CHANCES
def test_siblings_are_drawn_in_order_without_replacement(chance):
    probs, batch = torch.tensor([0.5, 0.3, 0.15, 0.05]), 60_000
    tree = draw_families(probs, 2, batch, chance=chance).build()
    pairs = (tree.tokens[:, 1] * 4 + tree.tokens[:, 2]).bincount(minlength=16) / batch
    for first, second in itertools.product(range(4), repeat=2):
        share = 0.0 if first == second else probs[first] * probs[second] / (1 - probs[first])
        assert pairs[4 * first + second] == pytest.approx(float(share), abs=0.008)


@CHANCES
def test_a_distribution_of_few_tokens_gives_as_many_children_as_it_has(chance):
    few = torch.tensor([0.0, 0.6, 0.0, 0.4, 0.0])
    tree = draw_families(few, 4, batch=50, chance=chance).build()
    assert tree.parents[:, 1:3].eq(0).all() and tree.parents[:, 3:].eq(PADDING).all()
    assert tree.tokens[:, 1:3].sort(1).values.tolist() == [[1, 3]] * 50
    assert tree.children_of(torch.zeros(50, dtype=torch.long))[:, 1:3].all()
    assert tree.draws == "without_replacement" and tree.branching == 4


def test_padding_gets_no_children():
    builder = draw_families(torch.tensor([0.0, 1.0, 0.0]), 2, batch=3)
    builder.best(2)
    builder.draw(torch.full((3, 2, 3), 1 / 3), 2)
    parents = builder.build().parents
    assert parents.tolist() == [[0, 0, PADDING, 1, 1, PADDING, PADDING]] * 3


def test_every_expanded_node_keeps_the_distribution_that_its_children_were_drawn_from():
    torch.manual_seed(0)
    builder = SampledTreeBuilder(torch.tensor([7]))
    builder.best(1)
    first, second = torch.rand(1, 1, 9).softmax(-1), torch.rand(1, 2, 9).softmax(-1)
    builder.draw(first, 3)
    beam = builder.best(2)
    builder.draw(second, 2)
    tree = builder.build()
    assert tree.draft_probs[0, 0].equal(first[0, 0])
    expanded = [int(tree.parents[0, 4]), int(tree.parents[0, 6])]
    assert tree.tokens[0, expanded].tolist() == beam.tokens[0].tolist()
    assert tree.draft_probs[0, expanded].equal(second[0])


# ---- through `generate`


def sample(target, drafter, seed=0, **settings):
    torch.manual_seed(seed)
    return target.generate(
        PROMPT,
        assistant_model=drafter,
        attention_mask=torch.ones_like(PROMPT),
        do_sample=True,
        max_new_tokens=12,
        return_dict_in_generate=True,
        **{**TREE, **settings},
    )


@pytest.mark.parametrize("rule", ["token", "traversal", "block"])
def test_a_seed_gives_the_same_sample_twice(target, drafter, rule):
    shape = {"tree_top_k": 1} if rule == "block" else {}
    texts = [
        sample(target, drafter, seed, verification=rule, drawn_tree=True, **shape).sequences
        for seed in (0, 0, 1)
    ]
    assert texts[0].equal(texts[1]) and not texts[0].equal(texts[2])


def test_a_drafter_that_agrees_with_the_target_is_accepted_whole(target, drafter):
    """At temperature near zero both draw their argmax; where they agree a chain is accepted."""
    cold = sample(target, drafter, temperature=1e-3, verification="traversal", tree_top_k=1)
    torch.manual_seed(0)
    greedy = target.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_new_tokens=12
    )
    assert cold.sequences.equal(greedy)


def test_the_scores_of_a_drawn_tree_are_those_of_the_emitted_tokens(target, drafter):
    out = sample(
        target,
        drafter,
        verification="traversal",
        repetition_penalty=1.3,
        output_scores=True,
        output_logits=True,
    )
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        text = out.sequences[:, : PROMPT.shape[1] + step]
        own = target(text).logits[:, -1]
        torch.testing.assert_close(logits, own, rtol=1e-3, atol=1e-3)
        assert scores.isfinite().any() and scores.shape == (1, VOCAB)
        assert scores[0, out.sequences[0, PROMPT.shape[1] + step]].isfinite()


@pytest.mark.parametrize("rule", ["traversal", "block"])
def test_where_tokens_are_verified_in_turn_the_token_rule_decides(target, drafter, rule):
    shape = {"tree_top_k": 1} if rule == "block" else {}
    settings = {**shape, "drawn_tree": True, "repetition_penalty": 1.3}
    found = [sample(target, drafter, verification=one, **settings) for one in (rule, "token")]
    assert found[0].sequences.equal(found[1].sequences)


def test_the_drafters_own_settings_choose_the_rule(target, drafter, monkeypatch):
    monkeypatch.setattr(drafter.generation_config, "verification", "traversal", raising=False)
    by_setting = sample(target, drafter).sequences
    assert by_setting.equal(sample(target, drafter, verification="traversal").sequences)
    assert not by_setting.equal(sample(target, drafter, verification="token").sequences)
    greedy = target.generate(PROMPT, assistant_model=drafter, do_sample=False, max_new_tokens=4)
    assert greedy.shape == (1, 9)  # settings for sampling have no say


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verification": "lucky"}, "`verification` is 'lucky'"),
        ({"verification": "greedy"}, "when sampling"),
        ({"verification": "block", "tree_top_k": 2}, "takes chains"),
        (
            {
                "verification": "traversal",
                "watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5], ngram_len=3),
            },
            "SynthIDTextWatermarkLogitsProcessor remembers",
        ),
        (
            {"drawn_tree": True, "guidance_scale": 1.5},
            "UnbatchedClassifierFreeGuidanceLogitsProcessor remembers",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(target, drafter, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(target, drafter, **settings)


@pytest.mark.parametrize("settings", [{"verification": "traversal"}, {"drawn_tree": True}])
def test_a_greedy_call_refuses_settings_for_sampling(target, drafter, settings):
    with pytest.raises(ValueError, match="the call is greedy"):
        target.generate(
            PROMPT, assistant_model=drafter, do_sample=False, max_new_tokens=4, **settings
        )
