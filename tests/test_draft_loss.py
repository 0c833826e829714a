"""The loss over a draft vocabulary equals its plain form, in value and in every gradient."""

import weakref

import pytest
import torch
from loss_inputs import HIDDEN, POSITIONS, STEPS, VOCAB, randn
from torch import nn

from coral_hf.training.losses.token_loss import Head, draft_goal, token_loss

TOKENS = torch.tensor([1, 4, 5, 9, 20, 21, 33, 48])
WEIGHTS = torch.tensor([1.0, 0.8, 0.64], dtype=torch.float64)


def inputs(dtype=torch.float64):
    """Predictions, a leaf, a trained head with a norm, and the target's logits."""
    predicted = randn(STEPS, POSITIONS, HIDDEN).to(dtype).requires_grad_()
    head = nn.Sequential(nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, len(TOKENS), bias=False)).to(dtype)
    head[1].weight.data = randn(len(TOKENS), HIDDEN, seed=2).to(dtype)
    logits = 2 * randn(POSITIONS, VOCAB, seed=3).to(dtype)
    logits[:, TOKENS] += 2  # so that the first choice often is a draft token
    return predicted, head, logits


def plain(predicted, head, logits):
    """The same with all logits at once, as it is written: position by position, step by step."""
    losses = []
    for step, weight in enumerate(WEIGHTS.to(predicted.dtype)):
        for position, row in enumerate(logits):
            if int(row.argmax()) in TOKENS.tolist():
                p = row.softmax(-1)[TOKENS]
                q = head(predicted[step, position]).log_softmax(-1)
                losses.append(-weight * (p / p.sum() * q).sum())
    return torch.stack(losses).sum()


def chunked(predicted, head, logits, chunk_size=4):
    """`token_loss` of the same."""

    def goal_of(rows):
        return draft_goal(logits[rows], TOKENS)

    weights = WEIGHTS.to(predicted.dtype)
    own = Head(head, [*head.parameters()])
    return token_loss(predicted, goal_of, own, step_weights=weights, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 64])
def test_loss_and_gradients_equal_the_plain_form_in_float64(chunk_size):
    predicted, head, logits = inputs()
    leaves = [predicted, *head.parameters()]
    found = chunked(predicted, head, logits, chunk_size).loss
    torch.testing.assert_close(found, plain(predicted, head, logits), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(3 * found, leaves),
        torch.autograd.grad(3 * plain(predicted, head, logits), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_position_whose_first_choice_is_no_draft_token_is_not_trained():
    predicted, head, logits = inputs()
    goal = draft_goal(logits, TOKENS)
    outside = ~torch.isin(logits.argmax(-1), TOKENS)
    assert 0 < outside.sum() < POSITIONS
    assert goal.probs[outside].eq(0).all() and goal.first[outside].eq(-1).all()
    torch.testing.assert_close(
        goal.probs[~outside].sum(-1),
        torch.ones_like(outside.sum()).double().expand(int((~outside).sum())),
    )
    assert TOKENS[goal.first[~outside]].equal(logits[~outside].argmax(-1))
    found = chunked(predicted, head, logits)
    (gradient,) = torch.autograd.grad(found.loss, predicted)
    assert gradient[:, outside].eq(0).all() and gradient[:, ~outside].abs().sum(-1).gt(0).all()
    assert not found.agreed[:, outside].any()


def test_agreement_is_that_of_first_choices():
    predicted, head, logits = inputs()
    found = chunked(predicted, head, logits).agreed
    assert found.equal(TOKENS[head(predicted).argmax(-1)] == logits.argmax(-1))
    assert 0 < found.sum() < found.numel()


def test_logits_of_one_chunk_alone_are_held():
    predicted, head, logits = inputs()
    alive, most, module = [], 0, head[1]

    def note(_, given, made):
        nonlocal most
        alive.append(weakref.ref(made))
        most = max(most, sum(one() is not None for one in alive))
        assert made.shape[1] <= 4

    module.register_forward_hook(note)
    loss = chunked(predicted, head, logits).loss
    assert most == 1 and len(alive) == 3
    assert {one.shape for one in loss.grad_fn.saved_tensors} == {
        predicted.shape,
        *(weight.shape for weight in head.parameters()),
    }


def test_without_gradients_none_are_computed():
    predicted, head, logits = inputs()
    with torch.no_grad():
        found = chunked(predicted, head, logits)
    torch.testing.assert_close(found.loss, plain(predicted, head, logits).detach())
    assert not found.loss.requires_grad


def test_a_frozen_head_gets_no_gradient():
    predicted, head, logits = inputs()
    head.requires_grad_(False)
    chunked(predicted, head, logits).loss.backward()
    assert predicted.grad is not None and head[1].weight.grad is None


def test_bf16_logits_are_summed_in_fp32():
    predicted, head, logits = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked(predicted, head, logits)
    assert found.loss.dtype == torch.float32
    found.loss.backward()
    assert head[1].weight.grad.dtype == torch.float32
    torch.testing.assert_close(found.loss, plain(predicted, head, logits), rtol=2e-2, atol=1e-2)
