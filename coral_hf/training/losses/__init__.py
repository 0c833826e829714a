"""The regression loss on features and the loss of a router.

In: predicted features of all steps at the trained positions, and the target's features there. Out:
sums over positions, to be divided by the number of trained tokens.
"""

from collections.abc import Callable

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
    target = target.to(predicted.dtype)
    by_step = [F.smooth_l1_loss(features, target, reduction="none") for features in predicted]
    return torch.stack([loss.float().mean(-1).sum() for loss in by_step])


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
