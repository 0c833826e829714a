"""Losses on features: regression, CORAL's alignment of steps, and that of a router.

In: predicted features of all steps at the trained positions, and the target's features there. Out:
sums over positions, to be divided by the number of trained tokens.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


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
        target: (positions, hidden), a further positive of each position, if given; constant.
        chunk_size: rows and columns of the similarity matrix held at a time.

    Returns:
        (), averaged over steps and summed over positions.
    """
    steps, positions, _ = predicted.shape
    unit = F.normalize(predicted.float(), dim=-1)
    further = unit[:0] if target is None else F.normalize(target.detach().float(), dim=-1)[None]
    keys = torch.cat([unit, further])
    lengths = lengths or [positions]
    normalisers = unit.new_zeros(())
    for part, around in zip(unit.split(lengths, 1), further.split(lengths, 1), strict=True):
        both = part.flatten(0, 1), around.flatten(0, 1)  # (steps * length, hidden) and beyond
        normalisers = normalisers + _LogNormalisers.apply(*both, temperature, chunk_size)
    # Σ_{p ∈ P(i)} z_i·z_p is z_i·(Σ over steps) less z_i·z_i
    together = keys.sum(0)
    positives = ((unit * together).sum(-1) - (unit * unit).sum(-1)) / (len(keys) - 1) / temperature
    return (normalisers - positives.sum()) / steps


class _LogNormalisers(torch.autograd.Function):
    """Sum log Σ_{a ≠ i} e^{z_i·z_a/τ} over rows i, where a are the rows and further keys.

    Similarities are symmetric: each block of them is computed once and read by rows and by columns,
    in the backward pass anew.

    rows: (rows, hidden); further: (keys, hidden), which get no gradient; size: rows of a block.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, further: Tensor, temperature: float, size: int) -> Tensor:
        found = rows.new_full((len(rows),), float("-inf"))
        with _in_float32(rows):
            for one, other, block in _similarities(rows, further, temperature, size):
                found[one] = found[one].logaddexp(block.logsumexp(1))
                if other not in (one, None):
                    found[other] = found[other].logaddexp(block.logsumexp(0))
        ctx.save_for_backward(rows, further, found)
        ctx.settings = temperature, size
        return found.sum()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        rows, further, normalisers = ctx.saved_tensors
        found = torch.zeros_like(rows)
        with _in_float32(rows):
            for one, other, block in _similarities(rows, further, *ctx.settings):
                shares = (block - normalisers[one, None]).exp_()  # of each row's sum
                if other == one:
                    shares = shares + shares.T
                elif other is not None:
                    shares += block.sub_(normalisers[other]).exp_()
                    found[other] += shares.T @ rows[one]
                found[one] += shares @ (further if other is None else rows[other])
        return gradient / ctx.settings[0] * found, None, None, None


def _in_float32(rows: Tensor) -> torch.autocast:
    """Bf16 products of unit vectors are off by 0.004, which a small temperature makes large."""
    return torch.autocast(rows.device.type, enabled=False)


def _similarities(
    rows: Tensor, further: Tensor, temperature: float, size: int
) -> Iterator[tuple[slice, slice | None, Tensor]]:
    """Yield z_i·z_a/τ of blocks of rows with each other, once a pair, and with further keys.

             rows     further
    rows   a  b  c  |  g         b, which is its transpose too, comes once, with the places of its
           ·  d  e  |  h         rows and of its columns; g has None for those of its columns
           ·  ·  f  |  i
    """
    scaled = rows / temperature
    places = [slice(start, start + size) for start in range(0, len(rows), size)]
    for number, one in enumerate(places):
        for other in places[number:]:
            block = scaled[one] @ rows[other].T
            yield one, other, block.fill_diagonal_(float("-inf")) if other == one else block
        if len(further):
            yield one, None, scaled[one] @ further.T
