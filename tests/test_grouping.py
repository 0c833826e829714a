"""Orders of the vocabulary whose slices are groups, and the counts of tokens."""

import pytest
import torch
from conftest import VOCAB, tiny_target
from datasets import Dataset

from coral_hf.heads.router import check_order
from coral_hf.target import Target, read_target
from coral_hf.training.features import CachedFeatures, write_features
from coral_hf.training.grouping import (
    alike_together,
    group_order,
    most_frequent_first,
    token_counts,
)

MADE = ("kmeans", "frequency")


def as_target(model) -> Target:
    return read_target(model)


@pytest.fixture(scope="module")
def target() -> Target:
    return as_target(tiny_target("llama", torch.float32))


@pytest.fixture(scope="module")
def rows() -> Dataset:
    torch.manual_seed(0)
    texts = [torch.randint(2, VOCAB, (6 + index % 7,)).tolist() for index in range(24)]
    return Dataset.from_list(
        [
            {
                "input_ids": text,
                "attention_mask": [1] * len(text),
                "labels": [-100, -100, -100, *text[3:]],
            }
            for text in texts
        ]
    )


# ---- orders


@pytest.mark.parametrize("grouping", MADE)
@pytest.mark.parametrize("num_groups", [1, 4, 7, 39, 40])
def test_an_order_holds_every_token_once(target, rows, grouping, num_groups):
    order = group_order(grouping, target, rows, num_groups)
    check_order(order, VOCAB)
    assert order.dtype == torch.int64


@pytest.mark.parametrize("grouping", MADE)
def test_the_same_seed_makes_the_same_order(target, rows, grouping):
    first, second, other = (group_order(grouping, target, rows, 4, seed) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    # all rows are read, in whatever order
    assert torch.equal(first, other) == (grouping == "frequency")


def test_contiguous_groups_need_no_order(target):
    assert group_order("contiguous", target, None, 4) is None


@pytest.mark.parametrize("grouping", MADE)
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "cohere"])
def test_targets_of_any_kind_have_orders(rows, grouping, family):
    model = tiny_target(family, torch.float32, vocab_size=50).bfloat16()
    check_order(group_order(grouping, as_target(model), rows, 7), 50)


@pytest.mark.parametrize("grouping", MADE)
def test_padding_of_the_vocabulary_comes_last(target, rows, grouping):
    order = group_order(grouping, target, rows, 6, num_tokens=35)
    assert order[35:].tolist() == [35, 36, 37, 38, 39]
    check_order(order, VOCAB)


def test_a_grouping_that_counts_needs_rows(target, rows):
    with pytest.raises(ValueError, match="needs training rows"):
        group_order("frequency", target, None, 4)
    untrained = rows.map(lambda row: {"labels": [-100] * len(row["input_ids"])})
    with pytest.raises(ValueError, match="no trained token"):
        group_order("frequency", target, untrained, 4)


def test_groups_by_similarity_need_a_readable_head(rows):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny_target("llama", torch.float32)
    quantize_(model, Int8WeightOnlyConfig(version=2))
    quantised = as_target(model)
    with pytest.raises(
        ValueError, match="quantised, offloaded or adapted. Use grouping='frequency'"
    ):
        group_order("kmeans", quantised, rows, 4)
    check_order(group_order("frequency", quantised, rows, 4), VOCAB)


# ---- kmeans


def test_kmeans_puts_equal_rows_together():
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(4).repeat(5)[torch.randperm(20, generator=generator)]
    rows = 3 * torch.randn(4, 8, generator=generator)[kinds]
    order = alike_together(rows, 5, generator)
    assert order.sort().values.tolist() == [*range(20)]
    for group in kinds[order].split(5):
        assert len(group.unique()) == 1


def test_halves_are_those_of_a_balanced_assignment():
    from scipy.optimize import linear_sum_assignment

    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    groups = alike_together(rows, 20, torch.Generator().manual_seed(0)).split(20)
    centroids = torch.stack([rows[group].mean(0) for group in groups])
    places = torch.cdist(rows, centroids).square().repeat_interleave(20, dim=1)
    _, best = linear_sum_assignment(places.numpy())
    assert {*groups[0].tolist()} == {*torch.tensor(best).lt(20).nonzero()[:, 0].tolist()}


# ---- counts


def test_counts_are_the_probabilities_of_trained_positions(target, rows):
    expected = torch.zeros(VOCAB, dtype=torch.float64)
    for row in rows:
        logits = target.model(torch.tensor([row["input_ids"]])).logits[0, 2:-1]
        expected += logits.detach().softmax(-1).sum(0)
    torch.testing.assert_close(token_counts(target, rows), expected, rtol=1e-4, atol=1e-6)


def test_frequent_tokens_come_first(target, rows):
    counts = token_counts(target, rows)
    order = group_order("frequency", target, rows, 4)
    assert (counts[order].diff() <= 0).all()
    assert torch.equal(order, most_frequent_first(counts))


def test_equal_counts_are_in_the_order_of_the_ids():
    counts = torch.tensor([0.0, 2.0, 0.0, 1.0, 2.0])
    assert most_frequent_first(counts).tolist() == [1, 4, 3, 0, 2]


@pytest.mark.parametrize("max_tokens", [1, 10, 1000])
def test_no_more_positions_are_read_than_were_asked_for(target, rows, max_tokens):
    trained = sum(len(row["input_ids"]) - 3 for row in rows)
    counts = token_counts(target, rows, max_tokens)
    torch.testing.assert_close(float(counts.sum()), float(min(max_tokens, trained)))


def test_a_stream_has_the_counts_of_its_rows(target, rows):
    stream = rows.to_iterable_dataset()
    counts = token_counts(target, rows)
    torch.testing.assert_close(token_counts(target, stream), counts, rtol=1e-4, atol=1e-6)


def test_cached_features_have_the_counts_of_computed_ones(rows, tmp_path):
    model = tiny_target("llama", torch.float32).bfloat16()
    write_features(model, rows, tmp_path)
    target, cached = as_target(model), CachedFeatures(tmp_path)
    online = token_counts(target, rows, max_tokens=50)
    torch.testing.assert_close(token_counts(target, cached, 50), online, rtol=0.05, atol=0.05)
