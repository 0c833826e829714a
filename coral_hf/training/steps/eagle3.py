"""Training step of EAGLE-3 drafters: fused layers → unroll → losses over the draft vocabulary.

In: batches of the collator. Out: predicted hidden states of every step, and their losses. Training-
time test of EAGLE-3 (Li et al. 2025): nothing compares hidden states, so gradients flow from a step
to those before it, and each step's loss weighs less than the one before.

    features (batch, length, (3 + 1) · hidden)
        the first three, of inner layers    → fuse → what step 1 reads
        the last, after the final norm      → the target's LM head → what all steps should predict
"""

from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...drafters.eagle3 import Eagle3Config, Eagle3Drafter
from ...target import FEATURE, Target, text_config
from ..adapters import is_adapted
from ..arguments import CoralTrainingArguments
from ..grouping import label_counts, most_frequent_first
from ..losses.draft_loss import DraftGoal, DraftLoss, draft_goal, draft_loss
from ..stages import freeze_others
from . import Losses, Trained, register_step
from .base import UnrolledStep
from .objectives import alignment, step_weights, token_notes


class Eagle3Step(UnrolledStep):
    """See [`coral_hf.training.steps.TrainingStep`]."""

    drafter = Eagle3Drafter
    recipes = ("eagle3",)
    stages = ("drafter",)
    can_shard = False  # the fusion and the LM head run outside of `forward`
    is_detached = False
    unused: tuple[str, ...] = ("regression_weight", "top_k_weight", "use_liger_kernel")

    def __init__(self, config: Eagle3Config, target: Target, args: CoralTrainingArguments):
        super().__init__(config, target, args)
        config.check_depth(text_config(target.model).num_hidden_layers)

    @classmethod
    def layers(cls, config: Eagle3Config) -> tuple[int, ...]:
        """The fused ones, and the feature."""
        return (*config.target_layers, FEATURE)

    def prepare(
        self,
        drafter: Eagle3Drafter | PeftModel,
        rows: Any,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Count the draft vocabulary of a fresh drafter; see [`TrainingStep`]."""
        vocab_size = text_config(self.target.model).vocab_size
        if bool((drafter.draft_tokens >= vocab_size).any()):
            raise ValueError(
                f"`vocab_size` of the target is {vocab_size}, but the drafter proposes tokens up to"
                f" {int(drafter.draft_tokens.max())}; train one of this target."
            )
        if not is_adapted(drafter):
            freeze_others(drafter, self.args.stage)
            if rows is not None and is_fresh(drafter):
                tokens = most_frequent_first(label_counts(rows, vocab_size))[: len(drafter.d2t)]
                drafter.set_draft_vocabulary(tokens.sort().values)

    def inputs(self, model: nn.Module, tokens: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Embed tokens (batch, length), and fuse the inner layers: (batch, length, hidden) each."""
        drafter = extract_model_from_parallel(model)
        embed = self.target.embed if drafter.embed_tokens is None else drafter.embed
        width = read.shape[-1] // len(self.features.layers)
        return embed(tokens), drafter.fuse(read[..., :-width])

    def losses(self, drafter: Eagle3Drafter, trained: Trained) -> Losses:
        """Compute the cross-entropy over the draft vocabulary of all steps, and L_csra."""
        recipe, predicted = self.args.resolved, trained.predicted
        weights, tokens = step_weights(recipe, predicted), drafter.draft_tokens

        def goal_of(rows: slice) -> DraftGoal:
            return draft_goal(self.target.head.logits(trained.target[rows]), tokens)

        head = [*drafter.norm.parameters(), *drafter.lm_head.parameters()]
        found = draft_loss(
            predicted, goal_of, drafter.draft_logits, head, weights, kept=trained.kept
        )
        terms = {"tokens": recipe.classification_weight * found.loss}
        return Losses(terms, self.notes(trained, found)) + alignment(trained, self.args)

    def notes(self, trained: Trained, found: DraftLoss) -> dict[str, Tensor]:
        """What is logged beside the loss."""
        return token_notes(trained.predicted, found.classification, found.agreed)

    def choices(self, drafter: Eagle3Drafter, predicted: Tensor, step: int) -> Tensor:
        """The token that the drafter finds best after each step: (rows, hidden) → (rows,)."""
        logits = drafter.draft_logits(predicted.to(drafter.dtype))
        return drafter.to_target_ids(logits.argmax(-1))


def is_fresh(drafter: Eagle3Drafter) -> bool:
    """Whether a draft vocabulary is still that of a new drafter, the target's first tokens."""
    is_part = len(drafter.d2t) < drafter.config.vocab_size
    return is_part and not drafter.training_record and not bool(drafter.d2t.any())


register_step(Eagle3Config.model_type, Eagle3Step)
