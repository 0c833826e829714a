"""A draft head ranks next tokens: the whole head, or the frequent tokens."""

import pytest
import torch
from head_inputs import make_head, make_level

from coral_hf.heads.draft_heads import FrequencyHead, FullHead

HOT = torch.tensor([7, 3, 40, 11, 2])
FINISHES = [{}, {"scale": 0.3}, {"softcap": 1.5}]


def make_frequency_head(head):
    return FrequencyHead(head, HOT, head.weight[HOT])


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_full_heads_children_are_the_most_probable_tokens(bias, finish):
    head = make_head(50, bias, **finish)
    features, log_path = make_level()
    children = FullHead(head).children(features, log_path, top_k=6)
    best, tokens = head.logits(features).log_softmax(-1).sort(-1, descending=True)
    assert children.tokens.equal(tokens[..., :6])
    torch.testing.assert_close(children.log_confidence, best[..., :6].float())


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_frequency_head_ranks_the_tokens_that_it_reads(bias, finish):
    head = make_head(50, bias, **finish)
    features, log_path = make_level()
    children = make_frequency_head(head).children(features, log_path, top_k=3)
    best, places = head.logits(features)[..., HOT].log_softmax(-1).sort(-1, descending=True)
    assert children.tokens.equal(HOT[places[..., :3]])
    torch.testing.assert_close(children.log_confidence, best[..., :3].float())


def test_the_frequency_head_gives_no_more_children_than_it_reads():
    children = make_frequency_head(make_head(50)).children(*make_level(), top_k=9)
    assert children.tokens.shape[-1] == len(HOT)


def test_the_frequency_heads_logits_are_the_targets_and_nothing_else():
    head, (features, log_path) = make_head(50, bias=True), make_level()
    logits = make_frequency_head(head).logits(features, log_path)
    assert logits.shape == (1, 3, 50) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[..., HOT], head.logits(features)[..., HOT].float())
    assert int(logits.isfinite().sum()) == 3 * len(HOT)


def test_confidence_is_never_above_one():
    head, level = make_head(50), make_level()
    for draft_head in (FullHead(head), make_frequency_head(head)):
        assert (draft_head.children(*level, 3).log_confidence <= 0).all()
