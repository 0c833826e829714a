"""What training steps share of families that have an LM head of their own.

In: predicted hidden states of all steps. Out: their losses over the drafter's vocabulary. Nothing
compares hidden states, so gradients flow from a step to those before it.
"""

from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ...target import text_config
from ..losses.token_loss import (
    Goal,
    Head,
    TokenLoss,
    TokenWeights,
    TorchChunkLoss,
    draft_goal,
    label_goal,
    token_loss,
)
from . import Losses, Trained
from .base import UnrolledStep
from .objectives import alignment, step_weights, token_notes

# positions whose logits are held at a time, those of all steps together
CHUNK = 64


class OwnHeadStep(UnrolledStep):
    """A training step whose drafter has `draft_tokens` and `draft_logits`."""

    stages: ClassVar[tuple[str, ...]] = ("drafter",)
    goals: ClassVar[tuple[str, ...]] = ("distribution", "tokens")
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

    def head(self, drafter: Any) -> Head:
        """The drafter's LM head, with what is trained of it."""
        parts: list[nn.Module | None] = [getattr(drafter, name) for name in self.head_parts]
        weights = [weight for part in parts if part is not None for weight in part.parameters()]
        return Head(drafter.draft_logits, weights)

    def goal(self, drafter: Any, trained: Trained, rows: slice) -> Goal:
        """What is to be predicted at some positions, over the drafter's vocabulary."""
        if self.args.goal == "tokens":
            assert trained.tokens is not None, "they come with a batch"
            return label_goal(trained.tokens[rows], drafter.draft_tokens)
        return draft_goal(self.target.head.logits(trained.target[rows]), drafter.draft_tokens)

    def losses(self, drafter: Any, trained: Trained) -> Losses:
        """Compute the cross-entropy over the drafter's vocabulary of all steps, and L_csra."""
        recipe, predicted = self.args.resolved, trained.predicted
        loss = TorchChunkLoss(TokenWeights(recipe.classification_weight))
        given = loss, step_weights(recipe, predicted), trained.kept, CHUNK
        goal_of = partial(self.goal, drafter, trained)
        found = token_loss(predicted, goal_of, self.head(drafter), *given)
        losses = Losses({"tokens": found.loss}, self.notes(trained, found))
        return losses + alignment(trained, self.args)

    def notes(self, trained: Trained, found: TokenLoss) -> dict[str, Tensor]:
        """What is logged beside the loss."""
        return token_notes(trained.predicted, found.classification, found.agreed)

    def choices(self, drafter: Any, predicted: Tensor, step: int) -> Tensor:
        """The token that the drafter finds best after a step: (rows, hidden) → (rows,)."""
        logits = drafter.draft_logits(predicted.to(drafter.dtype))
        return drafter.draft_tokens[logits.argmax(-1)]
