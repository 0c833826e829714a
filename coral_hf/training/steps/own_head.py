"""What training steps share of families that have an LM head of their own.

In: predicted hidden states of all steps. Out: their losses over the drafter's vocabulary. Nothing
compares hidden states, so gradients flow from a step to those before it.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...target import text_config
from ..losses.draft_loss import DraftGoal, DraftLoss, draft_goal, draft_loss, label_goal
from . import Losses, Trained
from .base import UnrolledStep
from .objectives import alignment, step_weights, token_notes


class OwnHeadStep(UnrolledStep):
    """A training step whose drafter has `draft_tokens` and `draft_logits`."""

    stages = ("drafter",)
    goals = ("distribution", "tokens")
    can_shard = False  # the LM head runs outside of `forward`
    is_detached = False
    head_parts: ClassVar[tuple[str, ...]]  # modules of a drafter that `draft_logits` runs
    unused: tuple[str, ...] = ("regression_weight", "top_k_weight", "use_liger_kernel")

    def follow_target(self, drafter: Any) -> None:
        """Refuse draft tokens that the target has not; see [`UnrolledStep`]."""
        vocab_size = text_config(self.target.model).vocab_size
        if bool((drafter.draft_tokens >= vocab_size).any()):
            raise ValueError(
                f"`vocab_size` of the target is {vocab_size}, but the drafter proposes tokens up to"
                f" {int(drafter.draft_tokens.max())}; train one of this target."
            )

    def losses(self, drafter: Any, trained: Trained) -> Losses:
        """Compute the cross-entropy over the drafter's vocabulary of all steps, and L_csra."""
        recipe, predicted = self.args.resolved, trained.predicted
        tokens, dtype = drafter.draft_tokens, torch.promote_types(predicted.dtype, torch.float32)

        def goal_of(rows: slice) -> DraftGoal:
            if self.args.goal == "tokens":
                assert trained.tokens is not None, "they come with a batch"
                return label_goal(trained.tokens[rows], tokens, dtype)
            return draft_goal(self.target.head.logits(trained.target[rows]), tokens)

        parts: list[nn.Module | None] = [getattr(drafter, name) for name in self.head_parts]
        head = [weight for part in parts if part is not None for weight in part.parameters()]
        weights = step_weights(recipe, predicted)
        found = draft_loss(
            predicted, goal_of, drafter.draft_logits, head, weights, kept=trained.kept
        )
        terms = {"tokens": recipe.classification_weight * found.loss}
        return Losses(terms, self.notes(trained, found)) + alignment(trained, self.args)

    def notes(self, trained: Trained, found: DraftLoss) -> dict[str, Tensor]:
        """What is logged beside the loss."""
        return token_notes(trained.predicted, found.classification, found.agreed)

    def choices(self, drafter: Any, predicted: Tensor, step: int) -> Tensor:
        """The token that the drafter finds best after a step: (rows, hidden) → (rows,)."""
        logits = drafter.draft_logits(predicted.to(drafter.dtype))
        return drafter.draft_tokens[logits.argmax(-1)]
