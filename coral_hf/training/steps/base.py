"""What training steps of families share that predict hidden states: target features → unroll.

In: batches of the collator. Out: what every step predicts. The target runs without gradient;
`Unrolled` draws how tokens, features and predictions are shifted.
"""

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...identity import seed_of
from ...lm_head import LMHead
from ...target import FEATURE, Target
from ..adapters import is_adapted
from ..arguments import CoralTrainingArguments
from ..features.reading import TargetFeatures
from ..stages import freeze_others
from . import TrainingStep, Unrolled
from .unroll import unroll


class Predicted(NamedTuple):
    """What a drafter predicts of a batch at each step."""

    hidden: Tensor  # (steps, batch, length - 1, hidden)
    kept: Tensor | None = None  # (steps, batch, length - 1), what is trained; None: all


class UnrolledStep(TrainingStep):
    """A training step whose drafter runs on its own predictions.

    A family says by `layers` and `inputs` what its first step reads, by `predict` how it runs, and
    by `follow_target` and `complete` what a drafter needs before it is trained.
    """

    can_shard = True
    is_detached = True  # a step's inputs: no gradient flows to the step before it
    unused: tuple[str, ...] = ()  # settings that mean nothing to the family

    def __init__(self, config: Any, target: Target, args: CoralTrainingArguments):
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
        """The feature alone."""
        return (FEATURE,)

    def prepare(self, drafter: Any, rows: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Complete a drafter, and freeze what is not trained; see [`TrainingStep`]."""
        self.follow_target(drafter)
        if not is_adapted(drafter):
            self.complete(drafter, rows, tokenizer)
            freeze_others(drafter, self.args.stage)

    def follow_target(self, drafter: Any) -> None:
        """Follow the target's vocabulary, or raise a ValueError; `drafter` as in `prepare`."""

    def complete(self, drafter: Any, rows: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Make what a drafter without an adapter lacks for its stage; see `prepare`."""

    def inputs(self, model: nn.Module, tokens: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """What the first step reads.

        Args:
            tokens: (batch, length), the token after each feature.
            read: (batch, length, layers · hidden), the target's.

        Returns:
            Embeddings and features, (batch, length, hidden) each.
        """
        return self.target.embed(tokens), read

    def predict(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, Tensor],
        positions: Tensor | None,
        labels: Tensor,
        num_steps: int,
    ) -> Predicted:
        """Run the drafter on what `inputs` gave, (batch, length - 1, hidden) each.

        Args:
            positions: (batch, length - 1), of packed rows.
            labels: (batch, length).
        """
        return Predicted(unroll(model, *inputs, num_steps, positions, self.is_detached))

    def unroll(self, model: nn.Module, batch: dict[str, Tensor], num_steps: int) -> Unrolled:
        """Predict what follows each pair of (next token, feature), `num_steps` times.

        position t           0        1        2        3
        the drafter reads    (x1,f0)  (x2,f1)  (x3,f2)  (x4,f3)
        and predicts         f̂1       f̂2       f̂3       f̂4
        """
        features = self.features.read(batch)  # (batch, length, layers · hidden)
        read = features[:, :-1]
        if model.training:
            read = add_noise(read, self.args.feature_noise, self.args.process_index)
        position_ids = batch.get("position_ids")
        positions = None if position_ids is None else position_ids[:, :-1]
        # not under no_grad in a head's stage: DDP prepares its gradients in this forward pass
        inputs = self.inputs(model, batch["input_ids"][:, 1:], read)
        labels = batch["labels"]
        predicted = self.predict(model, inputs, positions, labels, num_steps)
        width = features.shape[-1] // len(self.features.layers)
        goal = features[..., -width:]
        return Unrolled(predicted.hidden, goal, labels, position_ids, predicted.kept)

    def read_head(self, drafter: Any, hidden: Tensor) -> tuple[Tensor, LMHead]:
        """What draft heads read of predictions (*batch, hidden), and the LM head that they read."""
        return hidden, self.target.head


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
