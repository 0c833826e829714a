"""Training step of Medusa heads: target features → every head → losses on the tokens of the text.

In: batches of the collator. Out: what each head's LM head reads, and their losses. Medusa-1 (Cai et
al. 2024, section 2.2.1): the target is frozen, head i learns the token i + 1 further than its
feature, with a weight of 0.8 of the head before.

    position t       0    1    2    3          predictions of one token stand in one column:
    feature          f0   f1   f2   f3
    head 1 reads     f0   f1   f2   f3         the token t + 2
    head 2 reads     -    f0   f1   f2         no loss where a document has no such feature
    trained on       x2   x3   x4   x5
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...drafters.medusa import MedusaConfig, MedusaDrafter
from ...target import text_config
from ..adapters import is_adapted
from ..arguments import CoralTrainingArguments
from ..data.documents import Places
from ..losses.draft_loss import DraftGoal, draft_loss
from . import Losses, Trained, register_step
from .base import Predicted, UnrolledStep
from .objectives import step_weights, token_notes


class MedusaStep(UnrolledStep):
    """See [`coral_hf.training.steps.TrainingStep`]; `num_steps` heads are trained."""

    drafter = MedusaDrafter
    recipes = ("medusa",)
    stages = ("drafter",)
    goals = ("tokens",)
    can_shard = False  # the heads' own LM heads run outside of `forward`
    unused = (
        "regression_weight",
        "top_k_weight",
        "csra_weight",
        "use_liger_kernel",
        "single_step_share",
    )

    @classmethod
    def fresh_fields(cls, args: CoralTrainingArguments) -> dict[str, Any]:
        """A head for each step."""
        return {"num_heads": args.resolved.num_steps}

    def prepare(self, drafter: Any, rows: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Freeze the heads beyond `num_steps` too; see [`TrainingStep`]."""
        super().prepare(drafter, rows, tokenizer)
        if not is_adapted(drafter):
            for parts in (drafter.blocks, drafter.lm_heads):
                parts[self.args.resolved.num_steps :].requires_grad_(False)

    def follow_target(self, drafter: MedusaDrafter | PeftModel) -> None:
        """Refuse heads for another vocabulary; see [`UnrolledStep`]."""
        config, size = drafter.config, text_config(self.target.model).vocab_size
        if config.has_lm_heads and config.vocab_size != size:
            raise ValueError(
                f"`vocab_size` of the target is {size}, but the drafter's heads have"
                f" {config.vocab_size} tokens; start new ones from its blocks: warm_start(target,"
                " drafter)."
            )
        config.vocab_size = size

    def predict(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, Tensor],
        positions: Tensor | None,
        labels: Tensor,
        num_steps: int,
    ) -> Predicted:
        """Run `num_steps` heads, or all there are, on the features; see [`UnrolledStep`]."""
        states = model(inputs[1], num_steps)  # (heads, batch, length - 1, hidden)
        # how many features a document, or a branch of it, has before each position
        index = torch.arange(states.shape[2], device=states.device)
        if positions is not None:
            index = index - Places.of(positions).start
        kept = index >= torch.arange(len(states), device=index.device)[:, None, None]
        predicted = torch.stack([own.roll(head, 1) for head, own in enumerate(states)])
        return Predicted(predicted, kept.expand(predicted.shape[:3]))

    def losses(self, drafter: MedusaDrafter, trained: Trained) -> Losses:
        """Compute the cross-entropy of every head with the tokens of the text."""
        recipe, (predicted, _, _, tokens, kept) = self.args.resolved, trained
        assert tokens is not None, "an unroll selects them"
        size = drafter.config.vocab_size
        weights = step_weights(recipe, predicted)

        def goal_of(rows: slice) -> DraftGoal:
            own = tokens[rows]
            probs = weights.new_zeros(len(own), size).scatter_(1, own[:, None], 1.0)
            return DraftGoal(probs, own, None if kept is None else kept[:, rows])

        def logits_of(states: Tensor) -> Tensor:
            return drafter.logits(states, self.target.head)

        heads = [*drafter.lm_heads.parameters()]
        found = draft_loss(predicted, goal_of, logits_of, heads, weights)
        notes = token_notes(predicted, found.classification, found.agreed)
        return Losses({"tokens": recipe.classification_weight * found.loss}, notes)

    def choices(self, drafter: MedusaDrafter, predicted: Tensor, step: int) -> Tensor:
        """The token that a head finds best: (rows, hidden) → (rows,)."""
        states = predicted.to(drafter.dtype)
        head = drafter.lm_heads[step] if drafter.lm_heads else self.target.head.logits
        return head(states).argmax(-1)


register_step(MedusaConfig.model_type, MedusaStep)
