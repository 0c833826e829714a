"""Training step of CORAL drafters: losses on features and tokens, and of their draft heads."""

from ...drafters.coral import CoralConfig, CoralDrafter
from ..losses import regression_loss
from ..losses.token_loss import Head, token_loss
from ..stages import HEAD_OF
from . import Losses, Trained, TrainingStep, register_step
from .objectives import by_step


class CoralStep(TrainingStep):
    """See [`coral_hf.training.steps.TrainingStep`]."""

    drafter = CoralDrafter
    recipes = ("coral", "eagle", "hass")
    stages = ("drafter", *HEAD_OF)

    def losses(self, drafter: CoralDrafter, trained: Trained) -> Losses:
        """Compute the losses of the stage: of the drafter, its router, its low-rank head."""
        if self.args.stage == "low_rank":
            return self._low_rank_losses(drafter, trained)
        return super().losses(drafter, trained)

    def drafter_losses(self, drafter: CoralDrafter, trained: Trained) -> Losses:
        """Compute the losses on tokens and on features of all steps, with their weights."""
        losses = super().drafter_losses(drafter, trained)
        regression = regression_loss(trained.predicted, trained.target)  # (steps,)
        weighted = (regression * self.step_weights(trained)).sum()
        notes = {"regression_loss": regression.mean(), **by_step("regression_loss", regression)}
        weight = self.args.resolved.regression_weight
        return losses + Losses({"regression": weight * weighted}, notes)

    def _low_rank_losses(self, drafter: CoralDrafter, trained: Trained) -> Losses:
        """Compute the cross-entropy of the low-rank head and the target's, averaged over steps."""
        assert drafter.heads.low_rank is not None, "the stage has added one"
        squeezed = drafter.heads.low_rank(trained.predicted)  # (steps, positions, hidden)
        head = Head(self.target.head.logits)
        found = token_loss(squeezed, self.goal(drafter, trained), head)
        notes = {"low_rank_loss": found.classification.mean()}
        notes |= by_step("low_rank_agreement", found.agreed.sum(-1))
        return Losses({"low_rank": found.loss / len(squeezed)}, notes)


register_step(CoralConfig.model_type, CoralStep)
