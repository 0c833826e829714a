"""Recall of a router's active groups, by depth.

In: what each step of the unroll predicts at trained positions, and the target's features there.
Out: shares of positions. Step d stands where a chain of depth d stands, and a position reads the
groups that it wants itself, so this is the router alone, without what a tree's rows share.
"""

import torch
from torch import Tensor

from ...drafters.coral.modeling import CoralDrafter
from ...heads.router import UNUSED, Routing
from ...target import Target

CHUNK = 128  # positions whose logits are held at a time
TOP = 10  # of the drafter's own choices
NAMES = ("router_top_1_recall", f"router_top_{TOP}_recall", "router_mass")


class RoutingCounts:
    """Sums over positions, for each step of the unroll."""

    def __init__(self, steps: int):
        self.sums = torch.zeros(steps, len(NAMES), dtype=torch.float64)  # (steps, names)
        self.positions = 0

    @torch.no_grad()
    def add(
        self, drafter: CoralDrafter, target: Target, predicted: Tensor, features: Tensor
    ) -> None:
        """Count positions.

        Args:
            drafter: with a router.
            predicted: (steps, positions, hidden), the drafter's.
            features: (positions, hidden), the target's, that were to be predicted.
        """
        parts = zip(predicted.split(CHUNK, dim=1), features.split(CHUNK), strict=True)
        for guessed, true in parts:
            probs = target.head.logits(true).float().softmax(-1)  # (positions, vocab)
            steps = [_held(drafter, target, step, probs) for step in guessed]
            self.sums += torch.stack(steps).cpu()
        self.positions += len(features)

    def metrics(self, totals: Tensor) -> dict[str, float]:
        """Compute shares by name and depth.

        Args:
            totals: shape (steps · names + 1,), `flat` of all processes, added up.
        """
        shares = (totals[:-1] / totals[-1].clamp(min=1)).view_as(self.sums).tolist()
        return {
            f"{name}_depth_{depth}": share
            for depth, step in enumerate(shares, start=1)
            for name, share in zip(NAMES, step, strict=True)
        }

    def flat(self) -> Tensor:
        """Flatten all sums and the count, shape (steps · names + 1,), to add up over processes."""
        return torch.cat([self.sums.flatten(), self.sums.new_tensor([self.positions])])


def _held(drafter: CoralDrafter, target: Target, predicted: Tensor, probs: Tensor) -> Tensor:
    """Sum over positions what the active groups of one step hold: (names,).

    Args:
        predicted: (positions, hidden).
        probs: (positions, vocab), the target's.
    """
    assert drafter.heads.router is not None, "only counted for drafters with a router"
    groups = drafter.heads.router.groups_of(probs.shape[-1])
    log_mass = drafter.heads.router(predicted.to(drafter.dtype))[None, :, : groups.filled]
    routing = Routing.from_config(drafter.config).by_node()
    chosen = routing.choose(log_mass, log_mass.new_zeros(log_mass.shape[:2]))[0]
    # (positions, groups + 1), the last for slots that read nothing
    is_active = torch.zeros(
        len(probs), groups.num_groups + 1, dtype=torch.bool, device=probs.device
    )
    is_active.scatter_(1, chosen.where(chosen != UNUSED, groups.num_groups), True)
    group_of = groups.group_of().to(probs.device)
    own = target.head.logits(predicted).topk(min(TOP, probs.shape[-1])).indices
    held = (
        is_active.gather(1, group_of[probs.argmax(-1, keepdim=True)]),
        is_active.gather(1, group_of[own]),
        groups.mass(probs) * is_active[:, :-1],
    )
    first, best, mass = (part.double() for part in held)
    return torch.stack([first.sum(), best.mean(1).sum(), mass.sum()])
