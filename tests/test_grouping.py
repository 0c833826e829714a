"""Orders of the vocabulary whose slices are groups, and the counts of tokens."""

import pytest
import torch
from conftest import VOCAB, tiny_target
from datasets import Dataset
from head_inputs import SPLITS, group_of

from coral_hf.heads.router import Groups, check_order
from coral_hf.target import Target, read_target
from coral_hf.training.features import CachedFeatures, write_features
from coral_hf.training.grouping import group_order, most_frequent_first, token_counts
from coral_hf.training.grouping.order import balanced_groups, kmeans_groups

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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_groups": 0}, "`num_groups` is 0; use 1 to .* 40"),
        ({"num_groups": 41}, "`num_groups` is 41"),
        ({"grouping": "random"}, "'random'; use one of .*'kmeans'"),
    ],
)
def test_invalid_arguments_are_refused(target, fields, message):
    given = {"grouping": "kmeans", "target": target, "rows": None, "num_groups": 4, **fields}
    with pytest.raises(ValueError, match=message):
        group_order(**given)


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


# ---- balance


@pytest.mark.parametrize(("num_tokens", "num_groups"), SPLITS)
def test_balanced_groups_have_the_sizes_that_were_asked_for(num_tokens, num_groups):
    groups = Groups(num_tokens, num_groups)
    sizes = torch.bincount(group_of(groups), minlength=groups.filled)
    scores = torch.randn(num_tokens, groups.filled, generator=torch.Generator().manual_seed(0))
    found = balanced_groups(scores, sizes)
    assert torch.bincount(found, minlength=groups.filled).tolist() == sizes.tolist()


def test_balanced_groups_are_nearly_the_best():
    from scipy.optimize import linear_sum_assignment

    scores = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    found = scores.gather(1, balanced_groups(scores, torch.full((6,), 20))[:, None]).sum()
    columns = scores.repeat_interleave(20, dim=1).numpy()  # a column for each place
    best = columns[linear_sum_assignment(columns, maximize=True)].sum()
    assert 0.99 * best <= found <= best + 1e-3


def test_the_token_that_would_lose_most_keeps_its_group():
    scores = torch.tensor([[5.0, 4.0], [5.0, 0.0], [5.0, 3.0], [5.0, 4.0]])
    assert balanced_groups(scores, torch.tensor([2, 2])).tolist() == [1, 0, 0, 1]
    begun = torch.tensor([0, 1, 1, 0])
    assert balanced_groups(scores, torch.tensor([2, 2]), begun).tolist() == [1, 0, 0, 1]


# ---- kmeans


def test_kmeans_puts_equal_rows_together():
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(4).repeat(5)[torch.randperm(20, generator=generator)]
    rows = 3 * torch.randn(4, 8, generator=generator)[kinds]
    groups = kmeans_groups(rows, torch.full((4,), 5))
    for kind in range(4):
        assert len(set(groups[kinds == kind].tolist())) == 1


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
    with pytest.raises(ValueError, match="not finite"):
        most_frequent_first(counts.log().log())


def test_padding_of_the_vocabulary_is_never_counted(target, rows):
    counts = token_counts(target, rows, num_tokens=35)
    assert (counts[35:] == 0).all() and (counts[:35] > 0).all()


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
