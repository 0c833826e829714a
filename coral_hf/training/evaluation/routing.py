"""Recall of a router's active groups, by depth.

In: what each step of the unroll predicts at trained positions, and the target's features there.
Out: shares of positions. Step d stands where a chain of depth d stands, and a position reads the
groups that it wants itself, so this is the router alone, without what a tree's rows share.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...heads.router import Routing
from ...lm_head import LMHead
from ..steps import Trained
from ..steps.base import UnrolledStep

CHUNK = 128  # positions whose logits are held at a time
TOP = 10  # of the drafter's own choices
NAMES = ("router_top_1_recall", f"router_top_{TOP}_recall", "router_mass")


@torch.no_grad()
def routing_sums(step: UnrolledStep, drafter: Any, trained: Trained) -> Tensor:
    """Sum over positions what the active groups hold, by step: (steps, names + 1), on the CPU.

    The last column counts the positions.

    Args:
        step: of the trainer.
        drafter: with a router.
        trained: predictions (steps, positions, hidden) and features (positions, hidden).
    """
    sums = torch.zeros(len(trained.predicted), len(NAMES) + 1, dtype=torch.float64)
    parts = zip(trained.predicted.split(CHUNK, dim=1), trained.target.split(CHUNK), strict=True)
    for guessed, true in parts:
        probs = step.target.head.logits(true).float().softmax(-1)  # (positions, vocab)
        read = [step.read_head(drafter, one.to(drafter.dtype)) for one in guessed]
        sums += torch.stack([_held(drafter, *one, probs) for one in read]).cpu()
    return sums


def routing_metrics(sums: Tensor) -> dict[str, float]:
    """Compute shares by name and depth of `routing_sums`, (steps, names + 1)."""
    shares = (sums[:, :-1] / sums[:, -1:].clamp(min=1)).tolist()
    return {
        f"{name}_depth_{depth}": share
        for depth, step in enumerate(shares, start=1)
        for name, share in zip(NAMES, step, strict=True)
    }


def _held(drafter: Any, features: Tensor, head: LMHead, probs: Tensor) -> Tensor:
    """Sum over positions what the active groups of one step hold: (names + 1,).

    Args:
        features: (positions, hidden), what the router reads.
        head: that the drafter reads.
        probs: (positions, vocab), the target's.
    """
    assert drafter.heads.router is not None, "only counted for drafters with a router"
    groups = drafter.heads.router.groups_of(drafter.config.vocab_size)
    log_mass = drafter.heads.router(features)[None, :, : groups.filled]
    routing = Routing.from_config(drafter.config).by_node()
    chosen = routing.choose(log_mass, log_mass.new_zeros(log_mass.shape[:2]))[0]
    # (positions, groups + 1), the last for slots that read nothing: UNUSED is -1
    is_active = probs.new_zeros(len(probs), groups.num_groups + 1)
    is_active.scatter_(1, chosen % is_active.shape[1], 1.0)
    is_read = is_active[:, groups.group_of().to(probs.device)]
    # (positions, vocab) of the target, which may have other tokens by now
    is_read = F.pad(is_read, (0, probs.shape[-1] - groups.vocab_size))
    own = head.logits(features).topk(min(TOP, probs.shape[-1])).indices
    first = is_read.gather(1, probs.argmax(-1, keepdim=True))
    best = is_read.gather(1, own).mean(1)
    held = [part.double().sum() for part in (first, best, is_read * probs)]
    return torch.stack([*held, held[0].new_tensor(len(probs))])
