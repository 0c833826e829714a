"""The losses of a drafter and of a router.

In: predicted features of all steps at the trained positions, and the target's features there. Out:
sums over positions, to be divided by the number of trained tokens. Nothing here holds (positions ×
vocabulary) logits beyond one chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# (rows, hidden) → (rows, vocab)
LogitsOf = Callable[[Tensor], Tensor]


class Classification(NamedTuple):
    """Soft cross-entropy of each step, and how often the drafter's first choice is the target's."""

    loss: Tensor  # (steps,), summed over positions
    agreement: Tensor  # (steps,), positions whose argmax is the target's


def regression_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 between predicted and target features, averaged over channels (EAGLE, section 3.3).

    Args:
        predicted: (steps, positions, hidden).
        target: (positions, hidden).

    Returns:
        (steps,), summed over positions.
    """
    target = target.to(predicted.dtype).expand_as(predicted)
    return F.smooth_l1_loss(predicted, target, reduction="none").float().mean(-1).sum(-1)


def classification_loss(
    predicted: Tensor, target: Tensor, logits_of: LogitsOf, chunk_size: int = 128
) -> Classification:
    """Soft cross-entropy -Σ_v p(v) log q(v) of the target's and the drafter's next tokens.

    The frozen head makes the gradient with respect to features known in the forward pass,
    (softmax(z) - p)·∂z, so each chunk's logits are dropped at once: memory does not grow with
    vocabulary × steps.

    Args:
        predicted: (steps, positions, hidden).
        target: (positions, hidden).
        logits_of: the target's LM head.
        chunk_size: rows of logits held at a time.
    """
    return Classification(*_ChunkedCrossEntropy.apply(predicted, target, logits_of, chunk_size))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`plain_classification_loss` with the gradient computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx, predicted: Tensor, target: Tensor, logits_of: LogitsOf, chunk_size: int):
        steps = predicted.shape[0]
        loss, agreement = predicted.new_zeros(2, steps, dtype=torch.float32)
        gradient = torch.zeros_like(predicted)
        # chunks share two buffers: large temporaries cost page faults at every allocation
        target_buffer = logits_buffer = None
        for start in range(0, predicted.shape[1], chunk_size):
            rows = slice(start, start + chunk_size)
            with torch.no_grad():
                target_logits = target_buffer = _refill(target_buffer, logits_of(target[rows]))
            best = target_logits.argmax(-1)
            target_probs = torch.softmax(target_logits, -1, out=target_logits)  # (rows, vocab)
            for step in range(steps):
                features = predicted[step, rows].detach().requires_grad_()
                with torch.enable_grad():
                    raw = logits_of(features)
                logits = logits_buffer = _refill(logits_buffer, raw.detach())
                highest, first = logits.max(-1, keepdim=True)
                agreement[step] += (first[:, 0] == best).sum()
                logits -= highest
                loss[step] -= torch.dot(target_probs.view(-1), logits.view(-1))
                total = logits.exp_().sum(-1, keepdim=True)
                loss[step] += total.log().sum()
                slope = logits.div_(total).sub_(target_probs)  # softmax(z) - p
                (gradient[step, rows],) = torch.autograd.grad(raw, features, slope.to(raw.dtype))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(agreement)
        return loss, agreement

    @staticmethod
    def backward(ctx, loss_gradient: Tensor, _):
        (gradient,) = ctx.saved_tensors
        return gradient * loss_gradient[:, None, None].to(gradient.dtype), None, None, None


def _refill(buffer: Tensor | None, logits: Tensor) -> Tensor:
    """`logits` (rows, vocab) in fp32, in `buffer` where there is one.

    The first chunk is the longest, so the others fit.
    """
    if buffer is None:
        return logits.to(torch.float32, copy=True)
    return buffer[: len(logits)].copy_(logits)


def plain_classification_loss(predicted: Tensor, target: Tensor, logits_of: LogitsOf) -> Tensor:
    """`classification_loss` in plain terms, for reading and for tests: (steps,)."""
    target_probs = logits_of(target).float().softmax(-1)
    return -(target_probs * logits_of(predicted).float().log_softmax(-1)).sum((-1, -2))


def csra_loss(
    predicted: Tensor,
    temperature: float,
    lengths: list[int] | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Cross-step representation alignment: InfoNCE between the steps of a position (CORAL, CSRA).

    -1/|P(i)| Σ_{p ∈ P(i)} log( e^{z_i·z_p/τ} / Σ_{a ≠ i} e^{z_i·z_a/τ} ) for each feature i, z the
    normalised features, P(i) the same position at the other steps; all other features of the same
    sequence are negatives.

    Args:
        predicted: (steps, positions, hidden), at least two steps.
        temperature: τ.
        lengths: positions of each sequence, adding up to all; one sequence by default.
        chunk_size: rows of the similarity matrix held at a time.

    Returns:
        (), averaged over steps and summed over positions.
    """
    steps, positions, _ = predicted.shape
    if steps < 2:
        raise ValueError(
            f"CSRA compares steps with each other; `predicted` has {steps} of them, use at least 2."
        )
    unit = F.normalize(predicted.float(), dim=-1)
    normalisers = unit.new_zeros(())
    for sequence in unit.split(lengths or [positions], dim=1):
        rows = sequence.flatten(0, 1)  # (steps * length, hidden)
        for start in range(0, len(rows), chunk_size):
            normalisers = normalisers + checkpoint(
                _log_normaliser, rows, start, chunk_size, temperature, use_reentrant=False
            )
    # Σ_{p ∈ P(i)} z_i·z_p is z_i·(Σ over steps) less z_i·z_i
    together = unit.sum(0)
    positives = ((unit * together).sum(-1) - (unit * unit).sum(-1)) / (steps - 1) / temperature
    return (normalisers - positives.sum()) / steps


def _log_normaliser(rows: Tensor, start: int, chunk_size: int, temperature: float) -> Tensor:
    """log Σ_{a ≠ i} e^{z_i·z_a/τ} summed over a chunk of rows: (total, hidden) → ()."""
    chunk = rows[start : start + chunk_size]
    # bf16 products of unit vectors are off by 0.004, which a small temperature makes large
    with torch.autocast(rows.device.type, enabled=False):
        similarity = chunk @ rows.T / temperature  # (chunk, total)
    itself = torch.arange(len(chunk), device=rows.device)[:, None] + start
    return similarity.scatter(1, itself, float("-inf")).logsumexp(-1).sum()


def router_loss(
    log_mass: Tensor, target: Tensor, mass_of: Callable[[Tensor], Tensor], chunk_size: int = 128
) -> Tensor:
    """Cross-entropy of the router's group mass against the target's (CORAL, LM head router).

    Args:
        log_mass: (steps, positions, groups), the router's log-probabilities.
        target: (positions, hidden), the target's features.
        mass_of: (rows, hidden) → (rows, groups), the target's mass.
        chunk_size: rows of target logits held at a time.

    Returns:
        (steps,), summed over positions.
    """
    with torch.no_grad():
        # (positions, groups)
        mass = torch.cat([mass_of(rows) for rows in target.split(chunk_size)])
    return -(mass * log_mass).sum((-1, -2))
