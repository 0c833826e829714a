"""The vocabulary is cut into equal slices of an order of its tokens."""

import pytest
import torch
from head_inputs import SPLITS, group_of, make_order

from coral_hf.heads.router import Groups, check_order, order_hash

ORDER = torch.tensor([7, 2, 9, 0, 1, 3, 8, 4, 5, 6])  # of the drawing in `router.py`


def test_the_groups_of_the_drawing():
    plain, ordered = Groups(10, 4), Groups(10, 4, ORDER)
    assert (plain.size, plain.filled) == (3, 4)
    assert group_of(plain).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert group_of(ordered)[ORDER].tolist() == group_of(plain).tolist()
    places = torch.tensor([0, 2, 3]), torch.tensor([1, 2, 0])
    assert plain.tokens(*places).tolist() == [1, 8, 9]
    assert ordered.tokens(*places).tolist() == [2, 5, 6]


@pytest.mark.parametrize(("vocab_size", "num_groups"), SPLITS)
@pytest.mark.parametrize("is_ordered", [False, True])
def test_the_mass_of_a_group_is_its_tokens_sum(vocab_size, num_groups, is_ordered):
    groups = Groups(vocab_size, num_groups, make_order(vocab_size) if is_ordered else None)
    probs = torch.rand(2, 3, vocab_size, dtype=torch.float64).softmax(-1)
    mass = groups.mass(probs)
    assert mass.shape == (2, 3, num_groups)
    for group in range(num_groups):
        members = group_of(groups) == group
        torch.testing.assert_close(mass[..., group], probs[..., members].sum(-1))
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(("vocab_size", "num_groups"), SPLITS)
def test_groups_behind_the_last_token_are_not_filled(vocab_size, num_groups):
    groups = Groups(vocab_size, num_groups)
    assert groups.filled == int(group_of(groups).max()) + 1


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(9), r"has shape \(9,\)"),
        (torch.arange(10.0), "dtype torch.float32"),
        (torch.arange(1, 11), "names 9 different tokens; expected 10 different ids from 0 to 9"),
        (torch.arange(10) - 1, "names 9 different tokens"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 8]), "names 9 different tokens"),
    ],
)
def test_an_order_that_does_not_cover_the_vocabulary_is_refused(order, message):
    with pytest.raises(ValueError, match=message):
        check_order(order, 10)


def test_the_hash_of_an_order_tells_orders_apart():
    assert order_hash(ORDER) == order_hash(ORDER.int())
    assert order_hash(ORDER) != order_hash(torch.arange(10))
