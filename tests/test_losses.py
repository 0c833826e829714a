"""The losses on features and of the router equal their formulas."""

import torch
from loss_inputs import HIDDEN, POSITIONS, STEPS, chunked_token_loss, features, make_head, randn
from torch import Tensor

from coral_hf.heads.router import Groups
from coral_hf.training.losses import csra_loss, regression_loss, router_loss


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


def test_the_routers_loss_is_the_cross_entropy_of_the_groups_mass():
    groups, (_, target) = 4, features()
    log_mass = randn(STEPS, POSITIONS, groups).log_softmax(-1).requires_grad_()
    head = make_head()

    def mass_of(rows: Tensor) -> Tensor:
        assert len(rows) <= 4
        return Groups(head.logits(rows).softmax(-1).shape[-1], groups).mass(
            head.logits(rows).softmax(-1)
        )

    mass = Groups(head.logits(target).softmax(-1).shape[-1], groups).mass(
        head.logits(target).softmax(-1)
    )
    expected = torch.stack([-(mass * log_mass[step]).sum() for step in range(STEPS)])
    loss = router_loss(log_mass, target, mass_of, chunk_size=4)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), log_mass)
    torch.testing.assert_close(gradient, -mass.expand_as(gradient))


def test_a_batch_without_trained_positions_has_zero_loss():
    predicted, target = torch.zeros(STEPS, 0, HIDDEN, requires_grad=True), torch.zeros(0, HIDDEN)
    logits_of = make_head().logits
    losses = [
        regression_loss(predicted, target).sum(),
        chunked_token_loss(predicted, target, logits_of).loss,
        csra_loss(predicted, 0.07),
        router_loss(predicted[..., :4], target, lambda rows: logits_of(rows)[:, :4]).sum(),
    ]
    assert [loss.item() for loss in losses] == [0.0] * 4
    sum(losses).backward()
