"""Training step of CORAL drafters: target features → multi-step unroll → losses.

In: batches of the collator. Out: predicted features of every step, and their losses.
"""

from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...drafters.coral import CoralConfig, CoralDrafter
from ...heads.draft_heads import RoutedHead
from ..stages import HEAD_OF, add_heads, follow_vocabulary
from . import Losses, Trained, register_step
from .base import UnrolledStep
from .objectives import drafter_losses, low_rank_losses, router_losses


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
            router = drafter.heads.router
            assert router is not None, "the stage has added one"
            log_mass = router(trained.predicted)  # (steps, positions, groups)
            groups = router.groups_of(drafter.config.vocab_size)
            weight = self.args.router_weight if stage == "joint" else 1.0
            losses += router_losses(log_mass, trained.target, head, groups, weight)
        return losses

    def choices(self, drafter: CoralDrafter, predicted: Tensor, step: int) -> Tensor:
        """Choose the best child of each node by the drafter's own head: (rows, hidden) → (rows,).

        A level of a chain has one node, so each row reads what it wants itself.
        """
        head = drafter.heads.bind(self.target.head)
        if isinstance(head, RoutedHead):
            head = head.by_node()
        features = predicted[None].to(drafter.dtype)  # (1, rows, hidden)
        children = head.children(features, features.new_zeros(features.shape[:2]), top_k=1)
        return children.tokens[0, :, 0]


register_step(CoralConfig.model_type, CoralStep)
