"""Training steps of families with an LM head of their own: EAGLE-3, Recurrent Drafters, Medusa.

In: batches of the collator. Out: predicted hidden states of every step, and their losses over the
drafter's vocabulary. Nothing compares hidden states, so gradients flow from a step to those before
it, and a recipe may weigh each step's loss less than the one before.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ...drafters.eagle3 import Eagle3Config, Eagle3Drafter
from ...drafters.medusa import MedusaConfig, MedusaDrafter
from ...drafters.recurrent import RecurrentConfig, RecurrentDrafter
from ...lm_head import LMHead
from ...target import FEATURE, text_config
from ..arguments import CoralTrainingArguments
from ..data.documents import Places
from ..grouping import label_counts, most_frequent_first
from ..losses.token_loss import Goal, Head, TokenLoss, draft_goal, label_goal
from ..stages import is_adapted
from . import Trained, TrainingStep, register_step
from .base import Batch, Pair, Predicted, positions_of


class OwnHeadStep(TrainingStep):
    """A training step whose drafter has `draft_tokens` and `draft_logits`."""

    stages: ClassVar[tuple[str, ...]] = ("drafter",)
    goals: ClassVar[tuple[str, ...]] = ("distribution", "tokens")
    can_shard = False  # the LM head runs outside of `forward`
    is_detached = False
    head_parts: ClassVar[tuple[str, ...]]  # modules of a drafter that `draft_logits` runs
    unused: tuple[str, ...] = ("regression_weight", "top_k_weight")
    chunk_size = 64  # positions whose logits are held at a time, those of all steps together

    def follow_target(self, drafter: Any) -> None:
        """Refuse draft tokens that the target has not; see [`TrainingStep`]."""
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

    def goal(self, drafter: Any, trained: Trained) -> Callable[[slice], Goal]:
        """What is to be predicted, over the drafter's vocabulary; see [`TrainingStep`]."""
        tokens = drafter.draft_tokens
        if self.args.goal == "tokens":
            return lambda rows: label_goal(trained.tokens[rows], tokens)
        return lambda rows: draft_goal(self.target.head.logits(trained.target[rows]), tokens)

    def choices(self, drafter: Any, predicted: Tensor, step: int) -> Tensor:
        """See [`TrainingStep`]; (rows, hidden) → (rows,)."""
        return drafter.draft_tokens[super().choices(drafter, predicted, step)]


class Eagle3Step(OwnHeadStep):
    """The training-time test of EAGLE-3 (Li et al. 2025): fused layers → unroll → losses.

    features (batch, length, (3 + 1) · hidden)
        the first three, of inner layers    → fuse → what step 1 reads
        the last, after the final norm      → the target's LM head → what all steps should predict
    """

    drafter = Eagle3Drafter
    recipes = ("eagle3",)
    stages: ClassVar[tuple[str, ...]] = ("drafter", "router", "joint")
    head_parts = ("norm", "lm_head")

    @classmethod
    def layers(cls, config: Eagle3Config) -> tuple[int, ...]:
        """The fused ones, and the feature."""
        return (*config.target_layers, FEATURE)

    def complete(self, drafter: Any, rows: Any, tokenizer: Tokenizer | None) -> None:
        """Count the draft vocabulary of a fresh drafter, and add the head of the stage.

        That of a fresh one is still the target's first tokens.
        """
        is_part = len(drafter.d2t) < drafter.config.vocab_size
        if rows is not None and is_part and not drafter.training_record and not drafter.d2t.any():
            counts = label_counts(rows, text_config(self.target.model).vocab_size)
            tokens = most_frequent_first(counts)[: len(drafter.d2t)]
            drafter.set_draft_vocabulary(tokens.sort().values)
        super().complete(drafter, rows, tokenizer)

    def inputs(self, model: nn.Module, tokens: Tensor, read: Tensor) -> Pair:
        """Embed tokens (batch, length), and fuse the inner layers: (batch, length, hidden) each."""
        drafter = extract_model_from_parallel(model)
        embed = self.target.embed if drafter.embed_tokens is None else drafter.embed
        width = read.shape[-1] // len(self.features.layers)
        return embed(tokens), drafter.fuse(read[..., :-width])

    def read_head(self, drafter: Eagle3Drafter, hidden: Tensor) -> tuple[Tensor, LMHead]:
        """See [`TrainingStep`]: normed, (*batch, hidden) each, and the drafter's own."""
        return drafter.normed(hidden), LMHead(drafter.lm_head)


class RecurrentStep(OwnHeadStep):
    """Steps of a Recurrent Drafter: features and the text's own tokens → unroll → losses.

    Step n at position t is where a draft stands that began n - 1 tokens earlier, so all steps there
    predict the same token.

    position t           0           1           2              3
    step 1 has read      x1          x2          x3             x4
    the head reads       [f0;s]      [f1;s]      [f2;s]         [f3;s]
    step 2 has read      x1          x1 x2       x2 x3          x3 x4
    the head reads       [f0;s]      [f0;s]      [f1;s]         [f2;s]
    both predict         x2          x3          x4             x5
    """

    drafter = RecurrentDrafter
    recipes = ("recurrent",)
    head_parts = ("input_proj", "lm_head")
    unused = (*OwnHeadStep.unused, "csra_weight")  # steps go on from other features

    def inputs(self, model: nn.Module, tokens: Tensor, read: Tensor) -> Pair:
        """Embed tokens (batch, length); states (batch, length, 2 · hidden) that have read none."""
        return self.target.embed(tokens), torch.cat([read, torch.zeros_like(read)], dim=-1)

    def notes(self, trained: Trained, found: TokenLoss) -> dict[str, Tensor]:
        """See [`TrainingStep`]; steps at a position are not alike, so none are compared."""
        return super().notes(trained._replace(predicted=trained.predicted[:1]), found)

    def choices(self, drafter: RecurrentDrafter, predicted: Tensor, step: int) -> Tensor:
        """See [`TrainingStep`]; (rows, hidden) → (rows,)."""
        logits = drafter.draft_logits(predicted.to(drafter.dtype))
        return drafter.draft_tokens[logits.argmax(-1)]


class MedusaStep(OwnHeadStep):
    """Medusa-1 (Cai et al. 2024, section 2.2.1): `num_steps` heads on features of a frozen target.

    Head i learns the token of the text that is i + 1 further than its feature.

    position t       0    1    2    3          predictions of one token stand in one column:
    feature          f0   f1   f2   f3
    head 1 reads     f0   f1   f2   f3         the token t + 2
    head 2 reads     -    f0   f1   f2         no loss where a document has no such feature
    trained on       x2   x3   x4   x5
    """

    drafter = MedusaDrafter
    recipes = ("medusa",)
    goals = ("tokens",)
    unused = (*OwnHeadStep.unused, "csra_weight", "single_step_share")

    @classmethod
    def fresh_fields(cls, args: CoralTrainingArguments) -> dict[str, Any]:
        """A head for each step."""
        return {"num_heads": args.resolved.num_steps}

    def prepare(self, drafter: Any, rows: Any, tokenizer: Tokenizer | None) -> None:
        """Freeze the heads beyond `num_steps` too; see [`TrainingStep`]."""
        super().prepare(drafter, rows, tokenizer)
        if not is_adapted(drafter):
            for parts in (drafter.blocks, drafter.lm_heads):
                parts[self.args.resolved.num_steps :].requires_grad_(False)

    def follow_target(self, drafter: MedusaDrafter | PeftModel) -> None:
        """Refuse heads for another vocabulary; see [`TrainingStep`]."""
        config, size = drafter.config, text_config(self.target.model).vocab_size
        if config.has_lm_heads and config.vocab_size != size:
            raise ValueError(
                f"`vocab_size` of the target is {size}, but the drafter's heads have"
                f" {config.vocab_size} tokens; start new ones by warm_start(target, drafter)."
            )
        config.vocab_size = size

    def predict(self, model: nn.Module, inputs: Pair, batch: Batch, num_steps: int) -> Predicted:
        """Run `num_steps` heads, or all there are, on the features; see [`TrainingStep`]."""
        states = model(inputs[1], num_steps)  # (heads, batch, length - 1, hidden)
        # how many features a document, or a branch of it, has before each position
        starts = Places.of(positions_of(batch)).start
        index = torch.arange(states.shape[2], device=states.device) - starts
        kept = index >= torch.arange(len(states), device=index.device)[:, None, None]
        predicted = torch.stack([own.roll(head, 1) for head, own in enumerate(states)])
        return predicted, kept.expand(predicted.shape[:3])

    def head(self, drafter: MedusaDrafter) -> Head:
        """The LM heads, one a step, or the target's; see [`TrainingStep`]."""
        logits_of = partial(drafter.logits, target_head=self.target.head)
        return Head(logits_of, [*drafter.lm_heads.parameters()], is_by_step=True)

    def goal(self, drafter: MedusaDrafter, trained: Trained) -> Callable[[slice], Goal]:
        """The tokens of the text; see [`TrainingStep`]."""
        tokens = torch.arange(drafter.config.vocab_size, device=trained.tokens.device)
        return lambda rows: label_goal(trained.tokens[rows], tokens)

    def choices(self, drafter: MedusaDrafter, predicted: Tensor, step: int) -> Tensor:
        """See [`TrainingStep`]: by the head of the step, (rows, hidden) → (rows,)."""
        head = drafter.lm_heads[step] if drafter.lm_heads else self.target.head.logits
        return head(predicted.to(drafter.dtype)).argmax(-1)


register_step(Eagle3Config.model_type, Eagle3Step)
register_step(RecurrentConfig.model_type, RecurrentStep)
register_step(MedusaConfig.model_type, MedusaStep)
