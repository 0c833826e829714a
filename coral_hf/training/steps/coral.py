"""Training step of CORAL drafters: losses on features, beside those of every family."""

from ...drafters.coral import CoralConfig, CoralDrafter
from ..losses import regression_loss
from ..stages import ROUTER_STAGES
from . import Losses, Trained, TrainingStep, register_step
from .objectives import by_step


class CoralStep(TrainingStep):
    """See [`coral_hf.training.steps.TrainingStep`]."""

    drafter = CoralDrafter
    recipes = ("one_step_first", "coral", "eagle", "hass")
    stages = ("drafter", *ROUTER_STAGES)

    def drafter_losses(self, drafter: CoralDrafter, trained: Trained) -> Losses:
        """Compute the losses on tokens and on features of all steps, with their weights."""
        losses = super().drafter_losses(drafter, trained)
        regression = regression_loss(trained.predicted, trained.target)  # (steps,)
        weighted = (regression * self.step_weights(trained)).sum()
        notes = {"regression_loss": regression.mean(), **by_step("regression_loss", regression)}
        weight = self.args.resolved.regression_weight
        return losses + Losses({"regression": weight * weighted}, notes)


register_step(CoralConfig.model_type, CoralStep)
