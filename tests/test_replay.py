"""Simulated acceptance: one unroll gives the rounds that greedy chain decoding takes."""

from functools import partial

import pytest
import torch
from conftest import VOCAB, tiny_target
from datasets import Dataset

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments
from coral_hf.target import read_features, read_target
from coral_hf.training.evaluation.acceptance import (
    accepted_chains,
    agreement,
    replayed_rounds,
    walk,
)
from coral_hf.training.steps import Unrolled
from coral_hf.training.steps.coral import CoralStep
from coral_hf.training.steps.unroll import unroll

DEPTH = 4
CHAIN = {"tree_depth": DEPTH, "tree_top_k": 1, "tree_nodes": DEPTH + 1, "speculation": "always"}


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float64)


@pytest.fixture(scope="module")
def texts(target):
    """The target's own greedy texts: (24, 24), of which 4 tokens are the prompt."""
    torch.manual_seed(0)
    prompts = torch.randint(2, VOCAB, (24, 4))
    mask = torch.ones_like(prompts)
    return target.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=20)


@pytest.fixture(scope="module")
def drafter(target, texts, tmp_path_factory):
    """Trained a little, so that it is neither always right nor always wrong."""
    torch.manual_seed(0)
    rows = [{"input_ids": t, "attention_mask": [1] * len(t), "labels": t} for t in texts.tolist()]
    args = CoralTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("drafter")),
        max_steps=80,
        learning_rate=1e-2,
        classification_weight=1.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    drafter = CoralDrafter.from_target(target)
    CoralTrainer(
        model=drafter, target_model=target, args=args, train_dataset=Dataset.from_list(rows)
    ).train()
    return drafter.eval()


@torch.no_grad()
def unrolled(target, drafter, texts):
    """Predictions of all levels (steps, batch, length - 1, hidden), and the target's features."""
    read = read_target(target)
    features = read_features(target, texts, torch.ones_like(texts))
    return unroll(drafter, read.embed(texts[:, 1:]), features[:, :-1], DEPTH), features


def chooser(drafter, read):
    """The drafter's first choices, (rows, hidden) → (rows,)."""
    return partial(CoralStep(drafter.config, read, None).choices, drafter)


def decoded_rounds(target, drafter, prompt, new):
    output = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new,
        assistant_model=drafter,
        return_dict_in_generate=True,
        **CHAIN,
    )
    return output.stats.round_lengths


@pytest.mark.slow
def test_on_the_targets_own_text_the_rounds_are_those_of_chain_decoding(target, drafter, texts):
    labels = texts.clone()
    labels[:, :4] = -100
    read = read_target(target)
    replayed = replayed_rounds(
        chooser(drafter, read), read, Unrolled(*unrolled(target, drafter, texts), labels, None)
    )
    decoded = [decoded_rounds(target, drafter, text[None, :4], 20) for text in texts]
    assert replayed == sum(decoded, [])
    assert len(set(replayed)) >= 4  # some rounds accept nothing, some a whole chain


def test_from_every_prefix_a_chain_is_accepted_as_far_as_its_diagonal(target, drafter, texts):
    text = texts[:1]
    predicted, features = unrolled(target, drafter, text)
    read = read_target(target)
    agreed = agreement(chooser(drafter, read), read, predicted[:, 0, :-1], features[0, 1:-1])
    accepted = accepted_chains(agreed[:, None])[0].tolist()
    # the root is token t + 1, which the prompt's pass emits; its chain is that of position t
    for t in range(3, text.shape[1] - 2 - DEPTH):
        rounds = decoded_rounds(target, drafter, text[:, : t + 1], DEPTH + 2)
        assert rounds[0] == 1 + accepted[t]


def test_a_chain_is_a_diagonal_and_stops_at_the_first_disagreement():
    agreed = torch.tensor(
        [
            [[1, 1, 1, 0, 1]],  # step 1 at positions 0 … 4
            [[0, 1, 0, 1, 1]],
            [[1, 1, 1, 1, 1]],
        ]
    ).bool()
    # position 0: step 1 at 0, step 2 at 1, step 3 at 2; the text ends before step 2 of position 4
    assert accepted_chains(agreed).tolist() == [[3, 1, 3, 0, 1]]


def test_rounds_lead_from_root_to_root_and_end_with_each_stretch():
    trained = [False, False, False, True, True, True, True, True, False, False, True, True, True]
    accepted = [9, 9, 1, 9, 3, 9, 9, 9, 9, 0, 0]
    # root x3 accepts x4 and gives x5; root x5 would accept three, two are left;
    # the second stretch begins with the root x10: x11, then x12
    assert list(walk(accepted, trained)) == [2, 2, 1, 1]


def test_a_chain_ends_with_its_document(target, drafter, texts):
    """Two texts in a row: the two tokens that nothing predicts keep them apart."""
    row = texts[:2].reshape(1, -1)
    labels = row.clone()
    labels[:, [0, 1, 24, 25]] = -100
    read = read_target(target)
    whole = Unrolled(*unrolled(target, drafter, row), labels, None)
    rounds = replayed_rounds(chooser(drafter, read), read, whole)
    # of each text the first two tokens and the one of the prompt's pass belong to no round
    assert sum(rounds) == 2 * (24 - 3)


def test_a_routed_heads_first_choices_are_its_best_children(target, drafter):
    routed = CoralDrafter.from_target(target)
    routed.heads.add_router(7, 2)
    torch.nn.init.normal_(routed.heads.router.groups.weight)
    routed.config.is_router_trained, routed.config.draft_head = True, "routed"
    read = read_target(target)
    features = torch.randn(50, 32, dtype=torch.float64)
    head, root = routed.heads.bind(read.head), torch.zeros(1, 1)
    with torch.no_grad():
        children = [head.children(row[None, None], root, 1).tokens.item() for row in features]
        assert chooser(routed, read)(features, step=0).tolist() == children
        best = read.head.logits(features).argmax(-1).tolist()
        assert children != best  # the router leaves some of the best tokens out
        assert chooser(drafter, read)(features, step=0).tolist() == best
