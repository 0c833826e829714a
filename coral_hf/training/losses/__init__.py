"""Losses on features: regression, CORAL's alignment of steps, and that of a router.

In: predicted features of all steps at the trained positions, and the target's features there. Out:
sums over positions, to be divided by the number of trained tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def regression_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Compute smooth L1 of predicted features, averaged over channels (EAGLE, section 3.3).

    Args:
        predicted: (steps, positions, hidden).
        target: (positions, hidden).

    Returns:
        (steps,), summed over positions.
    """
    target = target.to(predicted.dtype).expand_as(predicted)
    return F.smooth_l1_loss(predicted, target, reduction="none").float().mean(-1).sum(-1)


def router_loss(
    log_mass: Tensor, target: Tensor, mass_of: Callable[[Tensor], Tensor], chunk_size: int = 128
) -> Tensor:
    """Compute the cross-entropy of the router's group mass and the target's (CORAL, section on
    the LM head router).

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


def csra_loss(
    predicted: Tensor,
    temperature: float,
    lengths: list[int] | None = None,
    target: Tensor | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Compute the alignment loss: InfoNCE between the steps of a position (CORAL, CSRA).

    -1/|P(i)| Σ_{p ∈ P(i)} log( e^{z_i·z_p/τ} / Σ_{a ≠ i} e^{z_i·z_a/τ} ) for each feature i, z the
    normalised features, P(i) the same position at the other steps; all other features of the same
    sequence are negatives.

    Args:
        predicted: (steps, positions, hidden), at least two steps.
        temperature: τ.
        lengths: positions of each sequence, adding up to all; one sequence by default.
        target: (positions, hidden), a further positive of each position, if given.
        chunk_size: rows of the similarity matrix held at a time.

    Returns:
        (), averaged over steps and summed over positions.
    """
    steps, positions, _ = predicted.shape
    unit = F.normalize(predicted.float(), dim=-1)
    keys = unit if target is None else torch.cat([unit, F.normalize(target.float(), dim=-1)[None]])
    lengths = lengths or [positions]
    normalisers = unit.new_zeros(())
    for part, around in zip(unit.split(lengths, 1), keys.split(lengths, 1), strict=True):
        rows = part.flatten(0, 1)  # (steps * length, hidden), as the first of `against`
        against = around.flatten(0, 1)
        for start in range(0, len(rows), chunk_size):
            chunk = rows[start : start + chunk_size]
            normalisers = normalisers + checkpoint(
                _log_normaliser, chunk, against, start, temperature, use_reentrant=False
            )
    # Σ_{p ∈ P(i)} z_i·z_p is z_i·(Σ over steps) less z_i·z_i
    together = keys.sum(0)
    positives = ((unit * together).sum(-1) - (unit * unit).sum(-1)) / (len(keys) - 1) / temperature
    return (normalisers - positives.sum()) / steps


def _log_normaliser(chunk: Tensor, against: Tensor, start: int, temperature: float) -> Tensor:
    """Sum log Σ_{a ≠ i} e^{z_i·z_a/τ} over a chunk of rows, the part of `against` at `start`.

    chunk: (rows, hidden); against: (total, hidden).
    """
    # bf16 products of unit vectors are off by 0.004, which a small temperature makes large
    with torch.autocast(chunk.device.type, enabled=False):
        similarity = chunk @ against.T / temperature  # (rows, total)
    itself = torch.arange(len(chunk), device=chunk.device)[:, None] + start
    return similarity.scatter(1, itself, float("-inf")).logsumexp(-1).sum()
