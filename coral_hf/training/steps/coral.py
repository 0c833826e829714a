"""Training step of CORAL drafters: target features → multi-step unroll → losses.

In: batches of the collator. Out: predicted features of every step, and their losses.
"""

from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...drafters.coral import CoralConfig, CoralDrafter
from ..stages import HEAD_OF, add_heads, follow_vocabulary
from . import Losses, Trained, register_step
from .base import UnrolledStep
from .objectives import drafter_losses, first_choices, low_rank_losses, router_losses


class CoralStep(UnrolledStep):
    """See [`coral_hf.training.steps.TrainingStep`]."""

    drafter = CoralDrafter
    recipes = ("coral", "eagle", "hass")
    stages = ("drafter", *HEAD_OF)

    def follow_target(self, drafter: CoralDrafter | PeftModel) -> None:
        """See [`UnrolledStep`]; heads keep the vocabulary that they were made for."""
        follow_vocabulary(drafter, self.target.model, self.args.stage)

    def complete(self, drafter: Any, rows: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Add the head of the stage; see [`UnrolledStep`]."""
        add_heads(drafter, self.args, self.target, rows, tokenizer)

    def losses(self, drafter: CoralDrafter, trained: Trained) -> Losses:
        """Compute the losses of the stage: of the drafter, its router, its low-rank head."""
        stage, head = self.args.stage, self.target.head
        if stage == "low_rank":
            assert drafter.heads.low_rank is not None, "the stage has added one"
            squeezed = drafter.heads.low_rank(trained.predicted)  # (steps, positions, hidden)
            return low_rank_losses(trained._replace(predicted=squeezed), head)
        losses = Losses({}, {})
        if stage in ("drafter", "joint"):
            losses += drafter_losses(trained, self.args, head)
        if stage in ("router", "joint"):
            losses += router_losses(drafter, trained.predicted, trained.target, head, self.args)
        return losses

    def choices(self, drafter: CoralDrafter, predicted: Tensor, step: int) -> Tensor:
        """See [`TrainingStep`]: by the draft head that is read, (rows, hidden) → (rows,)."""
        return first_choices(drafter, *self.read_head(drafter, predicted.to(drafter.dtype)))


register_step(CoralConfig.model_type, CoralStep)
