"""The Recurrent Drafter: its steps, beams and loss by their definitions."""

from functools import partial

import pytest
import torch
from conftest import VOCAB, scatter_weights, tiny_target
from test_examples import folder  # noqa: F401  a fixture: a saved target and its conversations
from test_families import PLAIN, drafted, prompts
from torch.nn import functional as F
from transformers import LlamaConfig

from coral_hf import (
    CoralDrafter,
    CoralTrainingArguments,
    RecurrentConfig,
    RecurrentDrafter,
)
from coral_hf.decoding.drafting import PADDING, TreeShape
from coral_hf.drafters.recurrent import RecurrentDrafting
from coral_hf.hub import CardFacts, make_card
from coral_hf.target import read_features, read_target
from coral_hf.training.evaluation.acceptance import replayed_rounds
from coral_hf.training.steps import training_step

FORMS = [{}, {"rnn": False}, {"exit_dim": 24, "num_draft_layers": 0}]


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


def drafter_of(target, **fields) -> RecurrentDrafter:
    """A random drafter whose weights are not small."""
    drafter = RecurrentDrafter.from_target(target, **fields).eval()
    scatter_weights(drafter, seed=1)
    return drafter


def read(tensors, state, embedding):
    """A step by its formula, from raw tensors: (hidden,) each."""
    if "rnn_w.weight" not in tensors:
        return embedding + state
    pre = tensors["rnn_w.weight"] @ embedding + tensors["rnn_u.weight"] @ state
    return F.silu(pre + tensors["rnn_u.bias"])


def log_probs(tensors, feature, state):
    """What the head says after a state, (vocab,), by its formula from raw tensors."""
    hidden = torch.cat([feature, state])
    if "input_proj.weight" in tensors:
        hidden = tensors["input_proj.weight"] @ hidden + tensors["input_proj.bias"]
    block = 0
    while f"lm_head.{block}.linear.weight" in tensors:
        name = f"lm_head.{block}.linear"
        hidden = hidden + F.silu(tensors[f"{name}.weight"] @ hidden + tensors[f"{name}.bias"])
        block += 1
    return (tensors[f"lm_head.{block}.weight"] @ hidden).log_softmax(-1)


def searched(tensors, table, feature, root, shape):
    """The best of what a beam search over lists has seen, as tokens from the root on."""
    beams, seen = [([], 0.0, read(tensors, torch.zeros_like(feature), table[root]))], []
    for _ in range(shape.depth):
        grown = []
        for tokens, confidence, state in beams:
            best = log_probs(tensors, feature, state).topk(shape.top_k)
            children = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            grown += [([*tokens, token], confidence + own, state) for token, own in children]
        seen += grown
        best = sorted(grown, key=lambda beam: -beam[1])[: shape.top_k]
        beams = [(t, c, read(tensors, state, table[t[-1]])) for t, c, state in best]
    best = sorted(seen, key=lambda beam: -beam[1])[: shape.nodes - 1]
    return {tuple(tokens) for tokens, *_ in best}


def paths_of(tree, row):
    """The tokens from the root to each node of a row, the root itself left out."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    paths, found = {0: ()}, []
    for node in range(1, len(tokens)):
        if parents[node] != PADDING:
            paths[node] = (*paths[parents[node]], tokens[node])
            found.append(paths[node])
            assert tree.depths[row, node] == len(paths[node])
    return found


def begun(target, drafter):
    """A drafting side that has read prompts, their last features, and roots."""
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(5))
    features = read_features(target, ids[:, :-1], torch.ones_like(ids[:, :-1]))
    drafting = RecurrentDrafting(drafter, read_target(target))
    drafting.begin(ids, features, torch.arange(6).expand(2, -1))
    return drafting, features[:, -1], ids[:, -1]


@pytest.mark.parametrize("fields", FORMS, ids=str)
@torch.no_grad()
def test_the_tree_is_the_best_that_a_plain_beam_search_has_seen(target, fields):
    drafter = drafter_of(target, **fields)
    drafting, features, roots = begun(target, drafter)
    table, tensors = target.model.embed_tokens.weight, drafter.state_dict()
    shape = TreeShape(depth=4, top_k=6, nodes=25)
    tree = drafting.propose(roots, shape)
    for row, (feature, root) in enumerate(zip(features, roots.tolist(), strict=True)):
        found = paths_of(tree, row)
        assert len(found) == 24 and {*found} == searched(tensors, table, feature, root, shape)
    assert tree.draws == "chosen" and tree.levels == 4


@torch.no_grad()
def test_a_tree_of_fewer_nodes_has_the_most_confident_ones(target):
    drafter = drafter_of(target)
    drafting, _, roots = begun(target, drafter)
    whole, part = (drafting.propose(roots, TreeShape(4, 6, nodes)) for nodes in (25, 6))
    assert part.tokens.shape == (2, 6)
    for row in range(2):
        kept, all_of_it = paths_of(part, row), paths_of(whole, row)
        assert len(kept) == 5 and {*kept} < {*all_of_it}
        assert all(path[:-1] in ((), *kept) for path in kept)


def test_a_beam_is_no_wider_than_the_vocabulary(target):
    plain = target.generate(**prompts(), **PLAIN)
    ours = drafted(target, drafter_of(target), prompts(), **PLAIN, tree_top_k=41)
    assert ours.sequences.equal(plain)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"exit_dim": 0}, "`exit_dim` is 0"), ({"num_draft_layers": -1}, "`num_draft_layers` is -1")],
)
def test_sizes_that_make_no_head_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        RecurrentConfig(**fields)


def test_a_target_that_has_gained_or_lost_tokens_is_followed(target):
    drafter, given = drafter_of(target), prompts()
    for size in (VOCAB + 3, VOCAB - 3):
        other = tiny_target("llama", vocab_size=size)
        ours = drafted(other, drafter, given, **PLAIN)
        assert ours.sequences.equal(other.generate(**given, **PLAIN))


# ---- training


def step_of(drafter, target, place, **settings):
    given = {"recipe": "recurrent", "report_to": "none", "use_cpu": True, "num_steps": 3}
    args = CoralTrainingArguments(str(place), **{**given, **settings})
    return training_step(drafter.config, read_target(target), args)


def batch_of(length=9):
    ids = torch.randint(2, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([torch.full((1, 3), -100), ids[:, 3:]], dim=1)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("goal", ["distribution", "tokens"])
@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_the_loss_is_that_of_each_draft_alone_in_every_gradient(target, tmp_path, fields, goal):
    """A draft from feature t predicts x_{t+2}, x_{t+3}, …, reading the text's own tokens."""
    drafter, batch = drafter_of(target, **fields), batch_of()
    step = step_of(drafter, target, tmp_path, goal=goal)
    losses = step.losses(drafter, step.unroll(drafter, batch, 3).trained())
    ids, tensors = batch["input_ids"], dict(drafter.named_parameters())
    features = read_features(target, ids, batch["attention_mask"])[0]
    goals = target.lm_head(features).softmax(-1)
    if goal == "tokens":
        goals[:-1] = F.one_hot(ids[0, 1:], VOCAB).double()
    embeddings, expected = target.model.embed_tokens(ids[0]), 0.0
    for token in range(3, 9):  # those that are trained
        for steps in range(1, 4):
            start = max(token - 1 - steps, 0)  # of its feature: no text begins before its first
            state = torch.zeros_like(features[0])
            for place in range(start + 1, token):
                state = read(tensors, state, embeddings[place])
            q = log_probs(tensors, features[start], state)
            expected = expected - (goals[token - 1] * q).sum()
    torch.testing.assert_close(losses.total, expected, rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad(losses.total, [*tensors.values()])
    theirs = torch.autograd.grad(expected, [*tensors.values()])
    for name, one, other in zip(tensors, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: n + m)
    assert "feature_similarity_2" not in losses.notes


@torch.no_grad()
def test_replayed_rounds_are_those_of_chain_decoding(target, tmp_path):
    drafter = drafter_of(target)
    prompt = torch.randint(3, VOCAB, (1, 4), generator=torch.Generator().manual_seed(0))
    chain = {"tree_depth": 3, "tree_top_k": 1, "tree_nodes": 4}
    ours = drafted(target, drafter, {"input_ids": prompt}, **PLAIN, **chain)
    labels = ours.sequences.clone()
    labels[:, :4] = -100
    batch = {"input_ids": ours.sequences, "labels": labels}
    batch["attention_mask"] = torch.ones_like(labels)
    step = step_of(drafter, target, tmp_path)
    unrolled = step.unroll(drafter, batch, 3)
    rounds = replayed_rounds(partial(step.choices, drafter), read_target(target), unrolled)
    assert rounds == ours.stats.round_lengths and len({*rounds}) > 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"csra_weight": 0.1}, "`csra_weight` is 0.1, which is not for a RecurrentDrafter"),
        ({"regression_weight": 1.0}, "`regression_weight` is 1.0, which is not for"),
        ({"goal": "text"}, "`goal` is 'text'; use one of"),
    ],
)
def test_losses_that_it_has_not_are_refused(target, tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        step_of(drafter_of(target), target, tmp_path, **settings)


def test_a_goal_of_another_family_is_refused(target, tmp_path):
    args = CoralTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, goal="tokens")
    with pytest.raises(ValueError, match="`goal` is 'tokens', but `model` is a CoralDrafter"):
        training_step(CoralDrafter.from_target(target).config, read_target(target), args)


def test_the_card_says_what_it_reads_and_has():
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, vocab_size=10)
    drafter = RecurrentDrafter(RecurrentConfig.from_target(config, num_hidden_layers=3))
    card = make_card(drafter, CardFacts("org/x")).content
    assert "recurrent-drafter" in card and "[Recurrent Drafter (2024)]" in card
    assert "| drafter | 3 layers of width 8" in card
    assert "| draft head | its own, over 10 tokens |" in card
    assert "hidden states of the target that it reads" not in card
