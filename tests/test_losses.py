"""Each loss equals its formula, in value and gradient, whatever the chunks."""

import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coral_hf.draft_head import LMHead, group_mass
from coral_hf.training.losses import (
    classification_loss,
    csra_loss,
    plain_classification_loss,
    regression_loss,
    router_loss,
)

STEPS, POSITIONS, HIDDEN, VOCAB = 3, 11, 8, 50
CHUNKS = [1, 4, 11, 128]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features() -> tuple[Tensor, Tensor]:
    """Predicted (steps, positions, hidden), a leaf, and the target's (positions, hidden)."""
    return randn(STEPS, POSITIONS, HIDDEN).requires_grad_(), randn(POSITIONS, HIDDEN, seed=1)


def make_head(dtype: torch.dtype = torch.float32, **finish) -> LMHead:
    module = nn.Linear(HIDDEN, VOCAB, bias=False)
    module.weight.data = randn(VOCAB, HIDDEN, seed=2).to(dtype)
    return LMHead(module.requires_grad_(False), **finish)


# ---- regression


def test_regression_is_smooth_l1_averaged_over_channels_and_summed_over_positions():
    predicted, target = features()
    expected = torch.zeros(STEPS)
    for step in range(STEPS):
        for position in range(POSITIONS):
            for x in (predicted[step, position] - target[position]).tolist():
                expected[step] += (x * x / 2 if abs(x) < 1 else abs(x) - 0.5) / HIDDEN
    torch.testing.assert_close(regression_loss(predicted, target), expected)


def test_regression_of_the_target_itself_is_zero():
    _, target = features()
    assert regression_loss(target.expand(STEPS, -1, -1), target).eq(0).all()


def test_regression_casts_the_targets_features_to_the_drafters_dtype():
    predicted, target = features()
    loss = regression_loss(predicted.bfloat16(), target.double())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, regression_loss(predicted, target), atol=0.2, rtol=2e-2)


# ---- classification


@pytest.mark.parametrize("finish", [{}, {"softcap": 2.0}, {"scale": 0.3}])
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_classification_equals_its_plain_form_in_value_and_gradient(chunk_size, finish):
    predicted, target = features()
    logits_of = make_head(**finish).logits
    weights = torch.tensor([1.0, 0.5, -2.0])  # the steps' gradients are their own
    loss, _ = classification_loss(predicted, target, logits_of, chunk_size)
    plain = plain_classification_loss(predicted, target, logits_of)
    torch.testing.assert_close(loss, plain)
    gradients = [
        torch.autograd.grad((value * weights).sum(), predicted)[0] for value in (loss, plain)
    ]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_classification_with_a_bf16_head_equals_its_plain_form_to_bf16():
    predicted, target = features()
    logits_of = make_head(torch.bfloat16).logits
    loss, _ = classification_loss(predicted, target, logits_of, chunk_size=4)
    plain = plain_classification_loss(predicted, target, logits_of)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain)
    gradients = [torch.autograd.grad(value.sum(), predicted)[0] for value in (loss, plain)]
    torch.testing.assert_close(*gradients, atol=3e-2, rtol=3e-2)


def test_plain_classification_is_the_soft_cross_entropy():
    predicted, target = features()
    logits_of = make_head().logits
    p, q = logits_of(target).softmax(-1), logits_of(predicted).softmax(-1)
    torch.testing.assert_close(
        plain_classification_loss(predicted, target, logits_of), -(p * q.log()).sum((1, 2))
    )


def test_classification_is_smallest_at_the_targets_own_features():
    _, target = features()
    own = target.expand(1, -1, -1).clone().requires_grad_()
    loss, agreement = classification_loss(own, target, make_head().logits)
    (gradient,) = torch.autograd.grad(loss.sum(), own)
    assert gradient.abs().max() < 1e-5
    assert agreement.tolist() == [POSITIONS]


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_agreement_counts_the_positions_whose_first_choice_is_the_targets(chunk_size):
    predicted, target = features()
    logits_of = make_head().logits
    agreement = classification_loss(predicted, target, logits_of, chunk_size).agreement
    same = logits_of(predicted).argmax(-1) == logits_of(target).argmax(-1)
    assert agreement.tolist() == same.sum(-1).tolist()
    assert not agreement.requires_grad


@pytest.mark.parametrize("finish", [{}, {"softcap": 2.0}])
def test_classification_holds_the_logits_of_one_chunk_and_of_one_step_at_a_time(finish):
    predicted, target = features()
    head, rows, alive, most = make_head(**finish), [], [], 0

    def logits_of(part: Tensor) -> Tensor:
        nonlocal most
        logits = head.logits(part)
        rows.append(len(part))
        alive.append(weakref.ref(logits))
        most = max(most, sum(reference() is not None for reference in alive))
        return logits

    loss, _ = classification_loss(predicted, target, logits_of, chunk_size=4)
    assert max(rows) == 4
    assert sum(rows) == (1 + STEPS) * POSITIONS
    assert most <= 2  # those of the step at hand, and of the one that it follows
    assert all(reference() is None for reference in alive)
    kept = [tensor.shape for tensor in loss.grad_fn.saved_tensors]
    assert kept == [predicted.shape]  # the gradient, not the logits


def test_a_large_logit_does_not_overflow():
    predicted, target = features()
    logits_of = LMHead(make_head().module, scale=1e4).logits
    loss, _ = classification_loss(predicted, target, logits_of)
    plain = plain_classification_loss(predicted, target, logits_of)
    assert loss.isfinite().all()
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-2)


# ---- cross-step representation alignment


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


def test_csra_with_lengths_tells_a_feature_only_from_those_of_its_own_sequence():
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


def test_csra_of_one_step_raises():
    with pytest.raises(ValueError, match="has 1 of them, use at least 2"):
        csra_loss(randn(1, POSITIONS, HIDDEN), 0.07)


# ---- router


def test_the_routers_loss_is_the_cross_entropy_of_the_groups_mass():
    groups, (_, target) = 4, features()
    log_mass = randn(STEPS, POSITIONS, groups).log_softmax(-1).requires_grad_()
    head = make_head()

    def mass_of(rows: Tensor) -> Tensor:
        assert len(rows) <= 4
        return group_mass(head.logits(rows).softmax(-1), groups)

    mass = group_mass(head.logits(target).softmax(-1), groups)
    expected = torch.stack([-(mass * log_mass[step]).sum() for step in range(STEPS)])
    loss = router_loss(log_mass, target, mass_of, chunk_size=4)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), log_mass)
    torch.testing.assert_close(gradient, -mass.expand_as(gradient))


# ---- nothing to train on


def test_a_batch_without_trained_positions_costs_nothing():
    predicted, target = torch.zeros(STEPS, 0, HIDDEN, requires_grad=True), torch.zeros(0, HIDDEN)
    logits_of = make_head().logits
    losses = [
        regression_loss(predicted, target).sum(),
        classification_loss(predicted, target, logits_of).loss.sum(),
        csra_loss(predicted, 0.07),
        router_loss(predicted[..., :4], target, lambda rows: logits_of(rows)[:, :4]).sum(),
    ]
    assert [loss.item() for loss in losses] == [0.0] * 4
    sum(losses).backward()
