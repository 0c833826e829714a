"""Training step of Recurrent Drafters: features and the text's own tokens → unroll → losses.

In: batches of the collator. Out: states of every step, and their losses. Step n at position t is
where a draft stands that began n - 1 tokens earlier, so all steps there predict the same token.

    position t           0           1           2              3
    step 1 has read      x1          x2          x3             x4
    the head reads       [f0;s]      [f1;s]      [f2;s]         [f3;s]
    step 2 has read      x1          x1 x2       x2 x3          x3 x4
    the head reads       [f0;s]      [f0;s]      [f1;s]         [f2;s]
    both predict         x2          x3          x4             x5
"""

import torch
from torch import Tensor, nn

from ...drafters.recurrent import RecurrentConfig, RecurrentDrafter
from ..losses.token_loss import TokenLoss
from . import Trained, register_step
from .objectives import token_notes
from .own_head import OwnHeadStep


class RecurrentStep(OwnHeadStep):
    """See [`coral_hf.training.steps.TrainingStep`]."""

    drafter = RecurrentDrafter
    recipes = ("recurrent",)
    head_parts = ("input_proj", "lm_head")
    unused = (*OwnHeadStep.unused, "csra_weight")  # steps go on from other features

    def inputs(self, model: nn.Module, tokens: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Embed tokens (batch, length); states (batch, length, 2 · hidden) that have read none."""
        return self.target.embed(tokens), torch.cat([read, torch.zeros_like(read)], dim=-1)

    def notes(self, trained: Trained, found: TokenLoss) -> dict[str, Tensor]:
        """See [`OwnHeadStep`]; steps at a position are not alike, so none are compared."""
        return token_notes(trained.predicted[:1], found.classification, found.agreed)


register_step(RecurrentConfig.model_type, RecurrentStep)
