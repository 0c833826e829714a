"""What a stage of training minimises: weighted losses of a batch, and what the log says of them.

In: the trained positions of an unrolled batch. Out: losses summed over positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...heads.groups import Groups
from ...lm_head import LMHead
from ..arguments import CoralTrainingArguments
from ..losses.csra import csra_loss, of_other_devices
from ..losses.liger_loss import LigerChunkLoss
from ..losses.losses import regression_loss, router_loss
from ..losses.token_loss import token_loss


class Unrolled(NamedTuple):
    """The trained positions of a batch."""

    predicted: Tensor  # (steps, positions, hidden)
    target: Tensor  # (positions, hidden), the features that were to be predicted
    lengths: list[int]  # trained positions of each document of the batch


class Losses(NamedTuple):
    """The terms of a loss, and sums to be logged; each () and summed over positions."""

    terms: dict[str, Tensor]
    notes: dict[str, Tensor]

    def __add__(self, other: "Losses") -> "Losses":  # type: ignore[override]
        return Losses({**self.terms, **other.terms}, {**self.notes, **other.notes})


def drafter_losses(unrolled: Unrolled, args: CoralTrainingArguments, head: LMHead) -> Losses:
    """L_reg, L_cls and L_topk of all steps, and L_csra, each with its weight."""
    predicted, target, _ = unrolled
    kernel = LigerChunkLoss() if args.use_liger_kernel else None
    tokens = token_loss(predicted, target, head.logits, args.token_weights, chunk_loss=kernel)
    regression = regression_loss(predicted, target)
    assert args.regression_weight is not None, "the recipe gives what is not set"
    terms = {"regression": args.regression_weight * regression.sum(), "tokens": tokens.loss.sum()}
    notes = {
        "regression_loss": regression.mean(),
        "classification_loss": tokens.classification.mean(),
        **by_step("regression_loss", regression),
        **by_step("classification_loss", tokens.classification),
        **by_step("agreement", tokens.agreed.sum(-1)),
        **by_step("feature_similarity", step_similarity(predicted), first=2),
    }
    if args.top_k_weight:
        notes["top_k_loss"] = tokens.top_k.mean()
    if args.csra_weight:
        notes["csra_loss"] = _csra(unrolled, args)
        terms["csra"] = args.csra_weight * notes["csra_loss"]
    return Losses(terms, notes)


def by_step(name: str, totals: Tensor, first: int = 1) -> dict[str, Tensor]:
    """A note for each step from `first` on: (steps,) → () each."""
    return {f"{name}_{step}": total for step, total in enumerate(totals, start=first)}


def step_similarity(predicted: Tensor) -> Tensor:
    """Cosine similarity of the later steps' predictions with step one's, summed over positions.

    (steps, positions, hidden) → (steps - 1,)
    """
    with torch.no_grad():
        first = predicted[0].float()
        later = [F.cosine_similarity(first, one.float(), -1).sum() for one in predicted[1:]]
        return torch.stack(later) if later else first.new_zeros(0)


def _csra(unrolled: Unrolled, args: CoralTrainingArguments) -> Tensor:
    predicted, target, lengths = unrolled
    if args.csra_gradient == "later_steps":
        predicted = torch.cat([predicted[:1].detach(), predicted[1:]])
    is_gathered = args.csra_negatives == "gathered"
    return csra_loss(
        predicted,
        args.csra_temperature,
        lengths=lengths if args.csra_negatives == "sequence" else None,
        others=of_other_devices(predicted.flatten(0, 1)) if is_gathered else None,
        target=target if args.csra_positives == "steps_and_target" else None,
    )


def router_losses(
    log_mass: Tensor, target: Tensor, head: LMHead, groups: Groups, weight: float = 1.0
) -> Losses:
    """Cross-entropy of the router's group mass against the target's, averaged over steps.

    Args:
        log_mass: (steps, positions, groups), the router's.
        target: (positions, hidden), the target's features.
        groups: of the router.
        weight: of the loss beside others.
    """

    def mass_of(features: Tensor) -> Tensor:
        return groups.mass(head.logits(features).float().softmax(-1))

    loss = router_loss(log_mass, target, mass_of).mean()
    return Losses({"router": weight * loss}, {"router_loss": loss})


def low_rank_losses(squeezed: Unrolled, head: LMHead) -> Losses:
    """Cross-entropy of what the low-rank head says against the target, averaged over steps.

    Args:
        squeezed: with `predicted` as low rank leaves it.
    """
    tokens = token_loss(squeezed.predicted, squeezed.target, head.logits)
    loss = tokens.loss.mean()
    notes = by_step("low_rank_agreement", tokens.agreed.sum(-1))
    return Losses({"low_rank": loss}, {"low_rank_loss": tokens.classification.mean(), **notes})
