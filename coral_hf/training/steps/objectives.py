"""Training objectives: the weighted losses of a stage, and what is logged of them.

In: the trained positions of a batch. Out: losses and notes for the log, summed over positions.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...heads.draft_heads import RoutedHead
from ...lm_head import LMHead
from ..arguments import CoralTrainingArguments, Recipe
from ..losses import regression_loss, router_loss
from ..losses.csra import csra_loss, of_other_devices
from ..losses.liger_loss import LigerChunkLoss
from ..losses.token_loss import Head, TargetGoal, TokenWeights, TorchChunkLoss, token_loss
from . import Losses, Trained


def drafter_losses(trained: Trained, args: CoralTrainingArguments, head: LMHead) -> Losses:
    """Compute L_reg, L_cls and L_topk of all steps, and L_csra, each with its weight."""
    recipe = args.resolved
    predicted, target = trained.predicted, trained.target
    weights = TokenWeights(recipe.classification_weight, recipe.top_k_weight, args.top_k)
    kernel = (LigerChunkLoss if args.use_liger_kernel else TorchChunkLoss)(weights)
    goal, weight = TargetGoal(head.logits, target), step_weights(recipe, predicted)
    by_weight = None if recipe.step_decay == 1 else weight
    tokens = token_loss(predicted, goal, Head(head.logits), kernel, by_weight)
    regression = regression_loss(predicted, target)
    terms = {
        "regression": recipe.regression_weight * (regression * weight).sum(),
        "tokens": tokens.loss,
    }
    notes = {
        "regression_loss": regression.mean(),
        **token_notes(predicted, tokens.classification, tokens.agreed),
        **by_step("regression_loss", regression),
    }
    if recipe.top_k_weight:
        notes["top_k_loss"] = tokens.top_k.mean()
    return Losses(terms, notes) + alignment(trained, args)


def step_weights(recipe: Recipe, losses: Tensor) -> Tensor:
    """The weight of each step's losses, (steps,), of tensors that begin with steps."""
    dtype = torch.promote_types(losses.dtype, torch.float32)
    return recipe.step_decay ** torch.arange(len(losses), dtype=dtype, device=losses.device)


def token_notes(predicted: Tensor, classification: Tensor, agreed: Tensor) -> dict[str, Tensor]:
    """What is logged of losses on tokens.

    Args:
        predicted: (steps, positions, hidden).
        classification: (steps,), summed over positions.
        agreed: (steps, positions), whether the drafter's first choice is the target's.
    """
    return {
        "classification_loss": classification.mean(),
        **by_step("classification_loss", classification),
        **by_step("agreement", agreed.sum(-1)),
        **by_step("feature_similarity", step_similarity(predicted), first=2),
    }


def alignment(trained: Trained, args: CoralTrainingArguments) -> Losses:
    """Compute L_csra with its weight; nothing where it has none, or there is a single step."""
    if not (weight := args.resolved.csra_weight) or len(trained.predicted) == 1:
        return Losses({}, {})
    loss = _csra(trained, args)
    return Losses({"csra": weight * loss}, {"csra_loss": loss})


def by_step(name: str, totals: Iterable[Tensor], first: int = 1) -> dict[str, Tensor]:
    """Name a note for each step from `first` on; a tensor of shape (steps,) → () each."""
    return {f"{name}_{step}": total for step, total in enumerate(totals, start=first)}


@torch.no_grad()
def step_similarity(predicted: Tensor) -> list[Tensor]:
    """Compare each later step's predictions with those of the first step.

    (steps, positions, hidden) → cosine similarity of each, of shape (), summed over positions
    """
    first = predicted[0].float()
    return [F.cosine_similarity(first, one.float(), -1).sum() for one in predicted[1:]]


def _csra(trained: Trained, args: CoralTrainingArguments) -> Tensor:
    """Compute L_csra with the settings of the run: (steps, positions, hidden) → ()."""
    predicted = trained.predicted
    if args.csra_gradient == "later_steps":
        predicted = torch.cat([predicted[:1].detach(), predicted[1:]])
    is_gathered = args.csra_negatives == "gathered"
    return csra_loss(
        predicted,
        args.csra_temperature,
        lengths=trained.lengths if args.csra_negatives == "sequence" else None,
        others=of_other_devices(predicted.flatten(0, 1)) if is_gathered else None,
        target=trained.target if args.csra_positives == "steps_and_target" else None,
    )


def router_losses(
    drafter: Any, predicted: Tensor, target: Tensor, head: LMHead, args: CoralTrainingArguments
) -> Losses:
    """Compute the cross-entropy of the router's group mass and the target's, averaged over steps.

    Args:
        drafter: with draft heads.
        predicted: (steps, positions, hidden), what its draft heads read.
        target: (positions, hidden), the target's features.
        head: the target's.
        args: of the run.
    """
    router, weight = drafter.heads.router, args.router_weight if args.stage == "joint" else 1.0
    assert router is not None, "the stage has added one"
    log_mass = router(predicted)  # (steps, positions, groups)
    groups = router.groups_of(drafter.config.vocab_size)

    def mass_of(features: Tensor) -> Tensor:  # (rows, hidden) → (rows, groups)
        return groups.mass(head.logits(features).float().softmax(-1))

    loss = router_loss(log_mass, target, mass_of).mean()
    return Losses({"router": weight * loss}, {"router_loss": loss})


def first_choices(drafter: Any, features: Tensor, lm_head: LMHead) -> Tensor:
    """The best child of each node by a drafter's own draft head: (rows, hidden) → (rows,).

    Nodes stand in chains, whose levels have one node: each row reads what it wants itself.
    """
    head = drafter.heads.bind(lm_head)
    if isinstance(head, RoutedHead):
        head = head.by_node()
    log_path = features.new_zeros(1, len(features))
    return head.children(features[None], log_path, top_k=1).tokens[0, :, 0]


def low_rank_losses(trained: Trained, head: LMHead) -> Losses:
    """Compute the cross-entropy of the low-rank head and the target's, averaged over steps.

    Args:
        trained: with `predicted` (steps, positions, hidden) after the low-rank projection.
    """
    goal = TargetGoal(head.logits, trained.target)
    tokens = token_loss(trained.predicted, goal, Head(head.logits))
    loss = tokens.loss / len(trained.predicted)
    notes = by_step("low_rank_agreement", tokens.agreed.sum(-1))
    return Losses({"low_rank": loss}, {"low_rank_loss": tokens.classification.mean(), **notes})
