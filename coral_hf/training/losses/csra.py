"""Cross-step representation alignment, the contrastive loss of CORAL.

In: predicted features of all steps at the trained positions. Out: a sum over positions.
"""

import torch
from torch import Tensor, distributed
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def csra_loss(
    predicted: Tensor,
    temperature: float,
    lengths: list[int] | None = None,
    others: Tensor | None = None,
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
        others: (rows, hidden), more negatives, such as the features of other devices.
        target: (positions, hidden), a further positive of each position, if given.
        chunk_size: rows of the similarity matrix held at a time.

    Returns:
        (), averaged over steps and summed over positions.
    """
    steps, positions, hidden = predicted.shape
    unit = F.normalize(predicted.float(), dim=-1)
    keys = unit if target is None else torch.cat([unit, F.normalize(target.float(), dim=-1)[None]])
    foreign = unit.new_zeros(0, hidden) if others is None else F.normalize(others.float(), dim=-1)
    lengths = lengths or [positions]
    normalisers = unit.new_zeros(())
    for part, around in zip(unit.split(lengths, 1), keys.split(lengths, 1), strict=True):
        rows = part.flatten(0, 1)  # (steps * length, hidden), as the first of `against`
        against = torch.cat([around.flatten(0, 1), foreign])
        for start in range(0, len(rows), chunk_size):
            chunk = rows[start : start + chunk_size]
            normalisers = normalisers + checkpoint(
                _log_normaliser, chunk, against, start, temperature, use_reentrant=False
            )
    # a device without positions takes part in the backward pass of the gathering too
    normalisers = normalisers + 0 * foreign.sum()
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


def of_other_devices(rows: Tensor) -> Tensor | None:
    """Gather the rows of all other devices; gradients flow back to the devices of their rows.

    Args:
        rows: (rows, hidden), whose number may differ between devices.

    Returns:
        (rows of the others, hidden), or None with a single device.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    from torch.distributed.nn.functional import all_gather

    counts = [0] * distributed.get_world_size()
    distributed.all_gather_object(counts, len(rows))
    gathered = all_gather(F.pad(rows, (0, 0, 0, max(counts) - len(rows))))
    others = [part[:count] for part, count in zip(gathered, counts, strict=True)]
    del others[distributed.get_rank()]
    return torch.cat(others) if others else None
