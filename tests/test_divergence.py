"""Divergences of a small language model and its target equal their formulas, and their gradients.

The heads of the tests are identities, so a state is the logits that it gives.
"""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coral_hf.training.losses.divergence import divergence

P, Q = [0.5, 0.3, 0.2], [0.2, 0.4, 0.4]
KINDS = ["kl", "tvd", "tvd++"]


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def compare(own, target, kind, **options):
    def same(rows):
        return rows

    return divergence(own, target, (same, same), kind, **options)


def drawn(positions=7, tokens=5, seed=0):
    """Logits of a small model and of its target, (positions, tokens) each."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, positions, tokens, generator=generator, dtype=torch.float64)
    return draw().requires_grad_(), draw()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", 0.5 * math.log(2.5) + 0.3 * math.log(0.75) + 0.2 * math.log(0.5)),
        ("tvd", 0.3),
        # token 0 alone has a reward, and q draws it in one case of five: deviation 0.4
        ("tvd++", 0.3 / 0.4),
    ],
)
def test_each_loss_has_its_written_out_value(kind, expected):
    found = compare(logits(Q), logits(P), kind)
    assert found.loss.item() == pytest.approx(expected)
    assert float(found.overlap) == pytest.approx(0.7)
    assert found.agreed.tolist() == [False]
    two = compare(logits(Q, P), logits(P, P), kind)
    # equal distributions add nothing to the sum, and a rewardless position to the deviation
    deviation = math.sqrt(0.1 * 0.9)
    assert two.loss.item() == pytest.approx(0.3 / deviation if kind == "tvd++" else expected)
    assert float(two.overlap) == pytest.approx(1.7)
    assert two.agreed.tolist() == [False, True]


def test_the_gradient_of_tvd_is_that_of_a_policy_with_a_reward_where_p_is_above_q():
    own, target = drawn()
    found = torch.autograd.grad(compare(own, target, "tvd").loss, own)[0]
    q, p = own.softmax(-1).detach(), target.softmax(-1)
    reward = (p > q).double()
    policy = -(q * reward * own.log_softmax(-1)).sum()  # its value is no loss, its gradient is
    torch.testing.assert_close(found, torch.autograd.grad(policy, own)[0])
    assert found.abs().max() > 0.01


def test_the_gradient_of_tvd_plus_plus_is_that_of_a_policy_with_a_normalised_advantage():
    own, target = drawn()
    found = torch.autograd.grad(compare(own, target, "tvd++").loss, own)[0]
    q, p = own.softmax(-1).detach(), target.softmax(-1)
    reward = (p > q).double()
    mean = (q * reward).sum() / len(q)
    deviation = ((q * (reward - mean) ** 2).sum() / len(q)).sqrt()
    advantage = (reward - mean) / deviation
    policy = -(q * advantage * own.log_softmax(-1)).sum()
    torch.testing.assert_close(found, torch.autograd.grad(policy, own)[0])


@pytest.mark.parametrize("kind", ["kl", "tvd"])
@pytest.mark.parametrize("tokens", [(5, 5), (5, 7), (7, 5)])
def test_gradients_are_those_of_finite_differences(kind, tokens):
    own, target = drawn(positions=3, tokens=tokens[0])[0], drawn(3, tokens[1], seed=1)[1]
    assert torch.autograd.gradcheck(lambda states: compare(states, target, kind).loss, own)


def test_every_gradient_of_a_step_raises_the_overlap():
    own, target = drawn()
    for kind in KINDS:
        found = compare(own, target, kind)
        (slope,) = torch.autograd.grad(found.loss, own)
        assert compare(own - 0.1 * slope, target, kind).overlap > found.overlap + 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_have_no_loss_and_no_gradient(kind):
    own, _ = drawn()
    found = compare(own, own.detach().clone(), kind)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(0, abs=1e-9)
    assert float(found.overlap) == pytest.approx(len(own)) and bool(found.agreed.all())
    assert float(own.grad.abs().max()) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_neither_value_nor_gradient(kind):
    results = []
    for size in (1, 3, 100):
        own, target = drawn()
        found = compare(own, target, kind, chunk_size=size)
        found.loss.backward()
        results.append((found.loss.detach(), found.overlap, found.agreed, own.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_tokens_that_one_model_lacks_have_no_probability_in_it():
    # the target has a fourth token, of which it is sure in half of the cases
    longer = compare(logits(Q), logits([0.25, 0.15, 0.1, 0.5]), "tvd")
    assert float(longer.overlap) == pytest.approx(0.2 + 0.15 + 0.1)
    assert longer.loss.item() == pytest.approx(1 - 0.45)
    kl = compare(logits(Q), logits([0.25, 0.15, 0.1, 0.5]), "kl").loss
    expected = [p * math.log(p / q) for p, q in zip([0.25, 0.15, 0.1], Q, strict=True)]
    assert kl.item() == pytest.approx(sum(expected))
    # the small model has one, which the target never accepts
    shorter = compare(logits([0.1, 0.2, 0.2, 0.5]), logits(P), "tvd")
    assert float(shorter.overlap) == pytest.approx(0.1 + 0.2 + 0.2)
    assert shorter.agreed.tolist() == [False]  # its first choice is that token


def test_no_positions_have_no_loss():
    own, target = drawn(positions=0)
    for kind in KINDS:
        found = compare(own, target, kind)
        found.loss.backward()
        assert found.loss.item() == 0 and found.agreed.shape == (0,)


class Largest(TorchDispatchMode):
    """The largest number of elements that an operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, list | tuple) else [found]:
            if isinstance(one, torch.Tensor):
                self.size = max(self.size, one.numel())
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_all_positions_never_exist_at_once(kind):
    positions, vocab, hidden, chunk = 512, 300, 4, 16
    states, features = torch.randn(2, positions, hidden).unbind()
    head = torch.randn(vocab, hidden, requires_grad=True)

    def logits_of(rows):
        return rows @ head.T

    with Largest() as largest:
        states.requires_grad_()
        divergence(states, features, (logits_of, logits_of), kind, chunk).loss.backward()
    assert head.grad.abs().max() > 0 and states.grad.abs().max() > 0
    assert largest.size == chunk * vocab
