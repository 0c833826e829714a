"""A draft head ranks next tokens: the whole head, the frequent tokens, a few channels of all."""

import pytest
import torch
from head_inputs import HIDDEN, make_head, make_level

from coral_hf.heads.draft_heads import FrequencyHead, FullHead, LowRank, LowRankHead

HOT = torch.tensor([7, 3, 40, 11, 2])
FINISHES = [{}, {"scale": 0.3}, {"softcap": 1.5}]


def make_frequency_head(head):
    return FrequencyHead(head, HOT, head.weight[HOT])


def make_low_rank(rank: int, head) -> LowRank:
    low_rank = LowRank(HIDDEN, rank).double()
    low_rank.start_from(head.weight.detach())
    return low_rank


def make_low_rank_head(head, rank: int = 4):
    low_rank = make_low_rank(rank, head)
    return LowRankHead(head, low_rank, head.weight @ low_rank.up.weight)


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


@pytest.mark.parametrize("bias", [False, True])
def test_all_channels_of_a_low_rank_head_are_the_whole_head(bias):
    head, (features, log_path) = make_head(50, bias, softcap=1.5), make_level()
    logits = make_low_rank_head(head, rank=HIDDEN).logits(features, log_path)
    torch.testing.assert_close(logits, head.logits(features).float(), rtol=1e-4, atol=1e-5)


def test_a_low_rank_head_squeezes_the_feature_and_reads_all_tokens():
    head, (features, log_path) = make_head(50), make_level()
    low_rank = make_low_rank(4, head)
    expected = head.logits(low_rank(features)).float()
    own = make_low_rank_head(head)
    torch.testing.assert_close(own.logits(features, log_path), expected)
    assert own.children(features, log_path, 5).tokens.equal(expected.topk(5).indices)
    assert own.weight.shape == (50, 4)


@torch.no_grad()
def test_low_rank_starts_from_the_best_channels():
    head = make_head(50)
    weight = head.weight.detach().float()
    errors = []
    for rank in (2, 4, 8):
        low_rank = make_low_rank(rank, head)
        squeezed = weight @ (low_rank.up.weight @ low_rank.down.weight).float()
        errors.append(float((weight - squeezed).norm()))
        best = torch.linalg.svdvals(weight)[rank:].norm()  # Eckart and Young
        torch.testing.assert_close(errors[-1], float(best), rtol=1e-4, atol=1e-4)
    assert errors == sorted(errors, reverse=True)


def test_confidence_is_never_above_one():
    head, level = make_head(50), make_level()
    for draft_head in (FullHead(head), make_frequency_head(head), make_low_rank_head(head)):
        assert (draft_head.children(*level, 3).log_confidence <= 0).all()
