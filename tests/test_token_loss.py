"""The losses on tokens equal their plain form, in value and gradient, whatever the chunks."""

import weakref

import pytest
import torch
from loss_inputs import (
    POSITIONS,
    STEPS,
    VOCAB,
    features,
    make_head,
    plain_token_loss,
)
from loss_inputs import chunked_token_loss as token_loss
from torch import Tensor

from coral_hf.lm_head import LMHead
from coral_hf.training.losses.token_loss import TokenWeights

CHUNKS = [1, 4, 11, 128]


@pytest.mark.parametrize("finish", [{}, {"softcap": 2.0}, {"scale": 0.3}])
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_classification_equals_its_plain_form_in_value_and_gradient(chunk_size, finish):
    predicted, target = features()
    logits_of = make_head(**finish).logits
    steps = torch.tensor([1.0, 0.5, -2.0])
    loss, *_ = token_loss(predicted, target, logits_of, chunk_size=chunk_size, steps=steps)
    plain = plain_token_loss(predicted, target, logits_of, steps=steps).loss
    torch.testing.assert_close(loss, plain)
    gradients = [torch.autograd.grad(value, predicted)[0] for value in (loss, plain)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_classification_with_a_bf16_head_equals_its_plain_form_to_bf16():
    predicted, target = features()
    logits_of = make_head(torch.bfloat16).logits
    loss, *_ = token_loss(predicted, target, logits_of, chunk_size=4)
    plain = plain_token_loss(predicted, target, logits_of).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain)
    gradients = [torch.autograd.grad(value.sum(), predicted)[0] for value in (loss, plain)]
    torch.testing.assert_close(*gradients, atol=3e-2, rtol=3e-2)


def test_plain_classification_is_the_soft_cross_entropy():
    predicted, target = features()
    logits_of = make_head().logits
    p, q = logits_of(target).softmax(-1), logits_of(predicted).softmax(-1)
    torch.testing.assert_close(
        plain_token_loss(predicted, target, logits_of).loss, -(p * q.log()).sum()
    )


def test_logged_values_carry_no_gradient():
    found = token_loss(*features(), make_head().logits)
    assert found.loss.requires_grad
    assert not (found.classification.requires_grad or found.top_k.requires_grad)


def test_classification_is_smallest_at_the_targets_own_features():
    _, target = features()
    own = target.expand(1, -1, -1).clone().requires_grad_()
    loss, _, _, agreed = token_loss(own, target, make_head().logits)
    (gradient,) = torch.autograd.grad(loss.sum(), own)
    assert gradient.abs().max() < 1e-5
    assert agreed.all()


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_a_position_agrees_where_the_first_choice_is_the_targets(chunk_size):
    predicted, target = features()
    logits_of = make_head().logits
    agreed = token_loss(predicted, target, logits_of, chunk_size=chunk_size).agreed
    assert agreed.equal(logits_of(predicted).argmax(-1) == logits_of(target).argmax(-1))
    assert 0 < agreed.sum() < agreed.numel()


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("weights", [TokenWeights(0.1, 1.0, 5), TokenWeights(0.0, 0.5, VOCAB)])
def test_top_k_distillation_equals_its_plain_form_in_value_and_gradient(chunk_size, weights):
    predicted, target = features()
    logits_of = make_head().logits
    steps = torch.tensor([1.0, 0.5, -2.0])
    ours = token_loss(predicted, target, logits_of, weights, chunk_size, steps)
    plain = plain_token_loss(predicted, target, logits_of, weights, steps)
    for name in ("loss", "classification", "top_k"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name))
    gradients = [torch.autograd.grad(found.loss, predicted)[0] for found in (ours, plain)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_top_k_distillation_of_the_whole_vocabulary_is_the_classification_loss():
    found = token_loss(*features(), make_head().logits, TokenWeights(1.0, 1.0, 10 * VOCAB))
    torch.testing.assert_close(found.top_k, found.classification)


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

    loss, *_ = token_loss(predicted, target, logits_of, chunk_size=4)
    assert max(rows) == 4
    assert sum(rows) == (1 + STEPS) * POSITIONS
    assert most <= 2  # those of the step at hand, and of the one that it follows
    assert all(reference() is None for reference in alive)
    kept = [tensor.shape for tensor in loss.grad_fn.saved_tensors]
    assert kept == [predicted.shape]  # the gradient, not the logits


def test_a_large_logit_does_not_overflow():
    predicted, target = features()
    logits_of = LMHead(make_head().module, scale=1e4).logits
    loss, *_ = token_loss(predicted, target, logits_of)
    plain = plain_token_loss(predicted, target, logits_of).loss
    assert loss.isfinite().all()
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-2)
