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

from functools import partial
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
from ..losses.token_loss import Goal, Head
from . import Trained, register_step
from .base import Predicted
from .own_head import OwnHeadStep


class MedusaStep(OwnHeadStep):
    """See [`coral_hf.training.steps.TrainingStep`]; `num_steps` heads are trained."""

    drafter = MedusaDrafter
    recipes = ("medusa",)
    goals = ("tokens",)
    unused = (*OwnHeadStep.unused, "csra_weight", "single_step_share")

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

    def head(self, drafter: MedusaDrafter) -> Head:
        """The LM heads, one a step, or the target's; see [`OwnHeadStep`]."""
        logits_of = partial(drafter.logits, target_head=self.target.head)
        return Head(logits_of, [*drafter.lm_heads.parameters()], is_by_step=True)

    def goal(self, drafter: MedusaDrafter, trained: Trained, rows: slice) -> Goal:
        """The tokens of the text; see [`OwnHeadStep`]."""
        assert trained.tokens is not None, "an unroll selects them"
        own = trained.tokens[rows]
        probs = torch.zeros(len(own), drafter.config.vocab_size, device=own.device)
        return Goal(probs.scatter_(1, own[:, None], 1.0), own)

    def choices(self, drafter: MedusaDrafter, predicted: Tensor, step: int) -> Tensor:
        """The token that a head finds best: (rows, hidden) → (rows,)."""
        states = predicted.to(drafter.dtype)
        head = drafter.lm_heads[step] if drafter.lm_heads else self.target.head.logits
        return head(states).argmax(-1)


register_step(MedusaConfig.model_type, MedusaStep)
