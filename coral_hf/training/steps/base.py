"""Training step of a family of drafters: the target's features → unroll → losses.

In: batches of the collator. Out: what every step predicts, and the losses of the stage. The target
runs without gradient; `Unrolled` draws how tokens, features and predictions are shifted.
"""

import random
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ...drafters.model import Drafter
from ...heads.draft_heads import RoutedHead
from ...identity import seed_of
from ...lm_head import LMHead
from ...target import FEATURE, Target
from ..arguments import CoralTrainingArguments
from ..features.reading import TargetFeatures
from ..grouping import group_order
from ..losses import router_loss
from ..losses.token_loss import CHUNK, Goal, Head, TokenLoss, TokenWeights, target_goal, token_loss
from ..stages import (
    ROUTER_STAGES,
    check_head_settings,
    default_groups,
    follow_vocabulary,
    freeze_others,
    is_adapted,
)
from .objectives import Losses, Trained, Unrolled, alignment, by_step, step_similarity
from .unroll import check_branches, unroll

Pair = tuple[Tensor, Tensor]  # embeddings and features, (batch, length - 1, hidden) each
# of the collator, (batch, length) each; of a feature cache `features` too, (batch, length, layers ·
# hidden)
Batch = dict[str, Tensor]
# hidden states of each step, (steps, batch, length - 1, hidden), and which of them are trained,
# (steps, batch, length - 1); None: all
Predicted = tuple[Tensor, Tensor | None]


class TrainingStep:
    """How the trainer trains one family of drafters; made as `kind(config, target, args)`.

    What a family does not say itself is as of CORAL drafters: the target's feature is read, all
    steps run on their own predictions, and draft heads read the target's LM head.
    """

    drafter: ClassVar[type[Drafter]]
    recipes: ClassVar[tuple[str, ...]]  # those of `RECIPES` for the family, the first by default
    stages: ClassVar[tuple[str, ...]]
    goals: ClassVar[tuple[str, ...]] = ("distribution",)  # what losses on tokens compare with
    can_shard = True  # whether FSDP and ZeRO-3 may hold parts of the drafter
    is_detached = True  # a step's inputs: no gradient flows to the step before it
    unused: tuple[str, ...] = ()  # settings that mean nothing to the family
    chunk_size = CHUNK  # positions whose logits are held at a time

    def __init__(self, config: Any, target: Target, args: CoralTrainingArguments):
        """Keep what the step reads: the drafter's config, its target, the settings of the run.

        Raises:
            ValueError: for settings that mean nothing to the family.
        """
        self.target, self.args = target, args
        self.features = TargetFeatures(target.model, self.layers(config))
        for name in self.unused:
            value = getattr(args, name) or getattr(args.resolved, name, 0)
            if value:
                raise ValueError(
                    f"`{name}` is {value}, which is not for a {self.drafter.__name__}; leave it"
                    " out."
                )

    @classmethod
    def layers(cls, config: Any) -> tuple[int, ...]:
        """Which of the target's `hidden_states` a drafter is trained on; the last is the feature.

        Features of a batch, computed or cached, are these side by side.
        """
        return (FEATURE,)

    @classmethod
    def fresh_fields(cls, args: CoralTrainingArguments) -> dict[str, Any]:
        """Fields of a fresh drafter's config that follow from the settings of its run."""
        return {}

    def prepare(self, drafter: Any, rows: Any, tokenizer: Tokenizer | None) -> None:
        """Get a drafter ready for its stage: make what it lacks, freeze what is not trained.

        Args:
            drafter: perhaps in a `PeftModel`.
            rows: the training rows; None for a trainer that only evaluates.
            tokenizer: the target's.
        """
        self.follow_target(drafter)
        if not is_adapted(drafter):
            self.complete(drafter, rows, tokenizer)
            freeze_others(drafter, self.args.stage)

    def follow_target(self, drafter: Any) -> None:
        """Follow the target's vocabulary, or raise a ValueError; `drafter` as in `prepare`."""
        follow_vocabulary(drafter, self.target.model, self.args.stage)

    def complete(self, drafter: Any, rows: Any, tokenizer: Tokenizer | None) -> None:
        """Make what a drafter without an adapter lacks for its stage; see `prepare`.

        Here it is the draft head that the stage trains, where there is none to be trained further.
        Groupings are counted from the rows; ids beyond the tokenizer's tokens pad the vocabulary.
        """
        args, config = self.args, drafter.config
        check_head_settings(drafter, args)
        size = config.vocab_size
        if args.stage in ROUTER_STAGES and drafter.heads.router is None:
            number, grouping = args.num_groups or default_groups(size), args.grouping or "kmeans"
            num_tokens = None if tokenizer is None else min(len(tokenizer), size)
            order = group_order(grouping, self.target, rows, number, args.seed, num_tokens)
            if order is not None:  # a target may have tokens that the drafter's own head has not
                order = order[order < size]
            active = args.num_active_groups or max(number // 8, 1)
            drafter.heads.add_router(number, active, order, grouping)

    def unroll(self, model: nn.Module, batch: Batch, num_steps: int) -> Unrolled:
        """Predict what follows each pair of (next token, feature), `num_steps` times.

        position t           0        1        2        3
        the drafter reads    (x1,f0)  (x2,f1)  (x3,f2)  (x4,f3)
        and predicts         f̂1       f̂2       f̂3       f̂4

        Args:
            model: the drafter as the run wraps it (DDP, FSDP2, DeepSpeed), through which every
                forward pass goes.
        """
        features = self.features.read(batch)  # (batch, length, layers · hidden)
        read = features[:, :-1]
        if model.training:
            read = add_noise(read, self.args.feature_noise, self.args.process_index)
        # not under no_grad in a head's stage: DDP prepares its gradients in this forward pass
        inputs = self.inputs(model, batch["input_ids"][:, 1:], read)
        hidden, kept = self.predict(model, inputs, batch, num_steps)
        goal = features[..., -(features.shape[-1] // len(self.features.layers)) :]
        return Unrolled(hidden, goal, batch["labels"], batch.get("position_ids"), kept)

    def inputs(self, model: nn.Module, tokens: Tensor, read: Tensor) -> Pair:
        """What the first step reads.

        Args:
            tokens: (batch, length), the token after each feature.
            read: (batch, length, layers · hidden), the target's.
        """
        return self.target.embed(tokens), read

    def predict(self, model: nn.Module, inputs: Pair, batch: Batch, num_steps: int) -> Predicted:
        """Run the drafter on what `inputs` gave, (batch, length - 1, hidden) each."""
        packed = positions_of(batch) if "position_ids" in batch else None
        check_branches(packed, self.args.resolved.num_steps)  # in a part of one step too
        return unroll(model, *inputs, num_steps, packed, self.is_detached), None

    def losses(self, drafter: Any, trained: Trained) -> Losses:
        """Compute the losses of the stage; `drafter` has no wrappers, and may run its heads."""
        stage, losses = self.args.stage, Losses({}, {})
        if stage in ("drafter", "joint"):
            losses += self.drafter_losses(drafter, trained) + alignment(trained, self.args)
        if stage in ROUTER_STAGES:
            losses += self.router_losses(drafter, trained)
        return losses

    def drafter_losses(self, drafter: Any, trained: Trained) -> Losses:
        """Compute the losses on tokens of all steps, with their weights."""
        recipe = self.args.resolved
        weights = TokenWeights(recipe.classification_weight, recipe.top_k_weight, self.args.top_k)
        scale = None if recipe.step_decay == 1 else self.step_weights(trained)
        goal, head = self.goal(drafter, trained), self.head(drafter)
        options = weights, scale, trained.kept, self.chunk_size
        found = token_loss(trained.predicted, goal, head, *options)
        losses = Losses({"tokens": found.loss}, self.notes(trained, found))
        if recipe.top_k_weight:
            losses.notes["top_k_loss"] = found.top_k.mean()
        return losses

    def step_weights(self, trained: Trained) -> Tensor:
        """The weight of each step's losses, (steps,)."""
        predicted = trained.predicted
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        steps = torch.arange(len(predicted), dtype=dtype, device=predicted.device)
        return self.args.resolved.step_decay**steps

    def goal(self, drafter: Any, trained: Trained) -> Callable[[slice], Goal]:
        """What is to be predicted at some positions, over the tokens of `head`."""
        return lambda rows: target_goal(self.target.head.logits(trained.target[rows]))

    def head(self, drafter: Any) -> Head:
        """The LM head that losses read, with what is trained of it."""
        return Head(self.target.head.logits)

    def notes(self, trained: Trained, found: TokenLoss) -> dict[str, Tensor]:
        """What is logged beside the loss, of shape () each, summed over positions."""
        return {
            "classification_loss": found.classification.mean(),
            **by_step("classification_loss", found.classification),
            **by_step("agreement", found.agreed.sum(-1)),
            **by_step("feature_similarity", step_similarity(trained.predicted), first=2),
        }

    def router_losses(self, drafter: Any, trained: Trained) -> Losses:
        """Compute the cross-entropy of the router's group mass and the target's, over steps."""
        router = drafter.heads.router
        weight = self.args.router_weight if self.args.stage == "joint" else 1.0
        read, _ = self.read_head(drafter, trained.predicted)
        log_mass = router(read)  # (steps, positions, groups)
        groups = router.groups_of(drafter.config.vocab_size)

        def mass_of(features: Tensor) -> Tensor:  # (rows, hidden) → (rows, groups)
            return groups.mass(self.target.head.logits(features).float().softmax(-1))

        loss = router_loss(log_mass, trained.target, mass_of).mean()
        return Losses({"router": weight * loss}, {"router_loss": loss})

    def read_head(self, drafter: Any, hidden: Tensor) -> tuple[Tensor, LMHead]:
        """What draft heads read of predictions (*batch, hidden), and the LM head that they read."""
        return hidden, self.target.head

    def choices(self, drafter: Any, predicted: Tensor, step: int) -> Tensor:
        """The token that the drafter finds best after a step, counted from 0.

        It is the best child of a node by the draft head that is read. Nodes stand in chains, whose
        levels have one node: each row reads what it wants itself. (rows, hidden) → (rows,)
        """
        hidden, lm_head = self.read_head(drafter, predicted.to(drafter.dtype))
        head = drafter.heads.bind(lm_head)
        if isinstance(head, RoutedHead):
            head = head.by_node()
        log_path = hidden.new_zeros(1, len(hidden))
        return head.children(hidden[None], log_path, top_k=1).tokens[0, :, 0]


def positions_of(batch: Batch) -> Tensor:
    """Positions of the tokens that are followed by another, (batch or 1, length - 1)."""
    ids = batch["input_ids"]
    return batch.get("position_ids", torch.arange(ids.shape[1], device=ids.device)[None])[:, :-1]


def drawn_generator(device: torch.device, process: int) -> torch.Generator:
    """A generator for draws in training that differ by process.

    Python's own generator, whose state is in every checkpoint, draws the seed. It is the same in
    all processes, to agree on the order of the data, so each process draws from another one.
    """
    return torch.Generator(device).manual_seed(seed_of(random.getrandbits(40), process))


def add_noise(features: Tensor, scale: float, process: int) -> Tensor:
    """Add uniform noise to features that a drafter reads in training (EAGLE, data augmentation).

    Args:
        features: (batch, length, hidden).
        scale: the largest magnitude; 0 leaves features as they are.
        process: index of the process.

    Returns:
        (batch, length, hidden).
    """
    if not scale:
        return features
    generator, noise = drawn_generator(features.device, process), torch.empty_like(features)
    return features + noise.uniform_(-scale, scale, generator=generator)
