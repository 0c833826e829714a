"""Cross-step representation alignment equals its formula, in value and gradient."""

import math

import pytest
import torch
from loss_inputs import HIDDEN, POSITIONS, STEPS, features, randn
from torch import Tensor
from torch.nn import functional as F

from coral_hf.training.losses import csra_loss


def naive_csra(predicted: Tensor, temperature: float) -> float:
    """The formula with loops over anchors i, positives p and all others a."""
    steps, positions = predicted.shape[:2]
    anchors = [(step, position) for position in range(positions) for step in range(steps)]
    vectors = {i: predicted[i].tolist() for i in anchors}

    def similarity(i, a) -> float:
        dot = sum(x * y for x, y in zip(vectors[i], vectors[a], strict=True))
        return math.exp(dot / math.hypot(*vectors[i]) / math.hypot(*vectors[a]) / temperature)

    total = 0.0
    for i in anchors:
        everything = sum(similarity(i, a) for a in anchors if a != i)
        positives = [p for p in anchors if p[1] == i[1] and p != i]
        total -= sum(math.log(similarity(i, p) / everything) for p in positives) / len(positives)
    return total / steps


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("steps", [2, 3])
def test_csra_equals_its_formula(steps, temperature):
    predicted = randn(steps, 4, HIDDEN)
    loss = csra_loss(predicted, temperature).item()
    assert loss == pytest.approx(naive_csra(predicted, temperature), rel=1e-4)


def whole_matrix_csra(predicted: Tensor, temperature: float) -> Tensor:
    """CSRA with the whole similarity matrix, for its gradient."""
    steps, positions, _ = predicted.shape
    rows = F.normalize(predicted, dim=-1).flatten(0, 1)
    position = torch.arange(positions).repeat(steps)
    itself = torch.eye(len(rows), dtype=torch.bool)
    scores = (rows @ rows.T / temperature).masked_fill(itself, float("-inf"))
    is_positive = (position[:, None] == position) & ~itself
    return -scores.log_softmax(-1)[is_positive].sum() / (steps - 1) / steps


@pytest.mark.parametrize("chunk_size", [4, 10, 33, 1024])
def test_csra_is_the_same_in_chunks_in_value_and_gradient(chunk_size):
    predicted, _ = features()
    ours, whole = (
        csra_loss(predicted, 0.1, chunk_size=chunk_size),
        whole_matrix_csra(predicted, 0.1),
    )
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(loss, predicted)[0] for loss in (ours, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_csra_with_lengths_has_negatives_of_the_same_sequence_only():
    predicted, _ = features()
    lengths = [4, 0, 1, POSITIONS - 5]
    apart = sum(csra_loss(part, 0.1) for part in predicted.split(lengths, dim=1))
    together = csra_loss(predicted, 0.1, lengths)
    torch.testing.assert_close(together, apart)
    assert together < csra_loss(predicted, 0.1)  # which has more to tell apart
    gradients = [torch.autograd.grad(loss, predicted)[0] for loss in (together, apart)]
    torch.testing.assert_close(*gradients)


def test_csra_reaches_both_sides_of_a_pair():
    predicted, _ = features()
    csra_loss(predicted, 0.1).backward()
    assert predicted.grad.abs().sum(-1).gt(0).all()


def test_csra_is_small_where_the_steps_agree_and_large_where_they_are_mixed_up():
    agreeing = randn(1, POSITIONS, HIDDEN).expand(STEPS, -1, -1)
    mixed = torch.stack([agreeing[0].roll(step, 0) for step in range(STEPS)])
    assert csra_loss(agreeing, 0.07) < csra_loss(mixed, 0.07)


def test_csra_with_the_target_has_it_as_one_more_step_that_is_no_anchor():
    predicted, target = features()
    keys = F.normalize(torch.cat([predicted, target[None]]), dim=-1).flatten(0, 1)
    scores = keys @ keys.T / 0.1
    itself = torch.eye(len(keys), dtype=torch.bool)
    position = torch.arange(POSITIONS).repeat(STEPS + 1)
    positive = (position[:, None] == position) & ~itself
    log_probs = scores.masked_fill(itself, float("-inf")).log_softmax(-1)
    anchors = slice(0, STEPS * POSITIONS)
    expected = -log_probs[anchors][positive[anchors]].sum() / STEPS / STEPS
    torch.testing.assert_close(csra_loss(predicted, 0.1, target=target), expected)
