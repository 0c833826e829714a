"""Training step of EAGLE-3 drafters: fused layers → unroll → losses over the draft vocabulary.

In: batches of the collator. Out: predicted hidden states of every step, and their losses. Training-
time test of EAGLE-3 (Li et al. 2025): nothing compares hidden states, so gradients flow from a step
to those before it, and each step's loss weighs less than the one before.

    features (batch, length, (3 + 1) · hidden)
        the first three, of inner layers    → fuse → what step 1 reads
        the last, after the final norm      → the target's LM head → what all steps should predict
"""

from typing import Any, ClassVar

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...drafters.eagle3 import Eagle3Config, Eagle3Drafter
from ...lm_head import LMHead
from ...target import FEATURE, text_config
from ..grouping import label_counts, most_frequent_first
from ..stages import add_heads
from . import Losses, Trained, register_step
from .objectives import first_choices, router_losses
from .own_head import OwnHeadStep


class Eagle3Step(OwnHeadStep):
    """See [`coral_hf.training.steps.TrainingStep`]."""

    drafter = Eagle3Drafter
    recipes = ("eagle3",)
    stages: ClassVar[tuple[str, ...]] = ("drafter", "router", "joint")
    head_parts = ("norm", "lm_head")

    @classmethod
    def layers(cls, config: Eagle3Config) -> tuple[int, ...]:
        """The fused ones, and the feature."""
        return (*config.target_layers, FEATURE)

    def complete(self, drafter: Any, rows: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Count the draft vocabulary of a fresh drafter, and add the head of the stage."""
        if rows is not None and is_fresh(drafter):
            counts = label_counts(rows, text_config(self.target.model).vocab_size)
            tokens = most_frequent_first(counts)[: len(drafter.d2t)]
            drafter.set_draft_vocabulary(tokens.sort().values)
        add_heads(drafter, self.args, self.target, rows, tokenizer)

    def inputs(self, model: nn.Module, tokens: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Embed tokens (batch, length), and fuse the inner layers: (batch, length, hidden) each."""
        drafter = extract_model_from_parallel(model)
        embed = self.target.embed if drafter.embed_tokens is None else drafter.embed
        width = read.shape[-1] // len(self.features.layers)
        return embed(tokens), drafter.fuse(read[..., :-width])

    def losses(self, drafter: Eagle3Drafter, trained: Trained) -> Losses:
        """Compute the losses of the stage: of the drafter, of its router."""
        stage, losses = self.args.stage, Losses({}, {})
        if stage in ("drafter", "joint"):
            losses += super().losses(drafter, trained)
        if stage in ("router", "joint"):
            read, _ = self.read_head(drafter, trained.predicted)
            losses += router_losses(drafter, read, trained.target, self.target.head, self.args)
        return losses

    def read_head(self, drafter: Eagle3Drafter, hidden: Tensor) -> tuple[Tensor, LMHead]:
        """See [`UnrolledStep`]: normed, (*batch, hidden) each, and the drafter's own."""
        return drafter.normed(hidden), LMHead(drafter.lm_head)

    def choices(self, drafter: Eagle3Drafter, predicted: Tensor, step: int) -> Tensor:
        """See [`TrainingStep`]: by the draft head that is read, (rows, hidden) → (rows,)."""
        read = self.read_head(drafter, predicted.to(drafter.dtype))
        return drafter.draft_tokens[first_choices(drafter, *read)]


def is_fresh(drafter: Eagle3Drafter) -> bool:
    """Whether a draft vocabulary is still that of a new drafter, the target's first tokens."""
    is_part = len(drafter.d2t) < drafter.config.vocab_size
    return is_part and not drafter.training_record and not bool(drafter.d2t.any())


register_step(Eagle3Config.model_type, Eagle3Step)
