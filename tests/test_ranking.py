"""The best logits of a row are found without a top-k or a softmax over all of them."""

import pytest
import torch
from torch import Tensor

from coral_hf.heads.products import BLOCK, best_places, rank

# what is read: few, whole blocks, and blocks of which the last is shorter
SIZES = [1, 40, 2 * BLOCK, 64 * BLOCK, 64 * BLOCK + 1, 65 * BLOCK - 1]


def make_logits(read: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(2, 3, read), in fp32 as heads give them, rounded to `dtype` before."""
    generator = torch.Generator().manual_seed(read)
    return (4 * torch.randn(2, 3, read, generator=generator)).to(dtype).float()


def in_order(logits: Tensor, top_k: int) -> Tensor:
    """The places of the largest logits, the lower of equal ones first: (*batch, top_k)."""
    return logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


# rounded to bfloat16 many logits are equal
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 10, 31])
@pytest.mark.parametrize("read", SIZES)
def test_the_best_are_those_of_a_stable_sort_with_their_log_softmax(read, top_k, dtype):
    logits, top_k = make_logits(read, dtype), min(read, top_k)
    expected = in_order(logits, top_k)
    log_probs = logits.double().log_softmax(-1).gather(-1, expected)
    ranked = rank(logits, top_k)
    assert ranked.places.equal(expected)
    torch.testing.assert_close(ranked.log_probs, log_probs.float(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("value", [0.0, -3.0, float("-inf")])
@pytest.mark.parametrize("read", [40, 65 * BLOCK - 1])
def test_of_equal_logits_the_first_places_are_the_best(read, value):
    logits = torch.full((1, read), value)
    assert best_places(logits, 5).tolist() == [[0, 1, 2, 3, 4]]
    logits[0, [read - 1, read // 2]] = 1.0
    assert best_places(logits, 4).tolist() == [[read // 2, read - 1, 0, 1]]


def test_tokens_that_are_not_read_are_impossible():
    logits = make_logits(40)
    logits[..., 3:] = float("-inf")
    ranked = rank(logits, 5)
    assert ranked.log_probs.isfinite().sum(-1).eq(3).all()
    assert ranked.log_probs[..., 3:].eq(float("-inf")).all()


def test_large_logits_do_not_overflow():
    logits = make_logits(64 * BLOCK) + 1e6
    ranked = rank(logits.clone(), 3)
    torch.testing.assert_close(
        ranked.log_probs, logits.log_softmax(-1).gather(-1, ranked.places), rtol=1e-6, atol=2e-6
    )


@pytest.mark.parametrize("read", [40, 64 * BLOCK])
def test_of_broken_logits_some_places_are_given(read):
    logits = make_logits(read)
    logits[0] = float("nan")
    logits[1, 1, 5] = float("-nan")
    places = rank(logits, 4).places
    assert places.min() >= 0 and places.max() < read
    assert all(len(set(row)) == 4 for row in places.flatten(0, 1).tolist())
