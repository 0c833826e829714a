"""Training step of CORAL drafters: target features → multi-step unroll → losses.

In: batches of the collator. Out: predicted features of every step, and their losses. The target
runs without gradient; `Unrolled` draws how tokens, features and predictions are shifted.
"""

import torch
from torch import Tensor, nn

from ...drafters.coral.modeling import CoralDrafter
from ...identity import seed_of
from ...target import Target
from ..arguments import CoralTrainingArguments
from ..features.reading import TargetFeatures
from . import Losses, Trained, Unrolled, register_step
from .objectives import drafter_losses, low_rank_losses, router_losses
from .unroll import unroll


class CoralStep:
    """See [`coral_hf.training.steps.TrainingStep`]."""

    def __init__(self, target: Target, args: CoralTrainingArguments):
        self.target = target
        self.args = args
        self.features = TargetFeatures(target.model)

    def unroll(self, model: nn.Module, batch: dict[str, Tensor], num_steps: int) -> Unrolled:
        """Predict the feature after each pair of (next token, feature), `num_steps` times.

        position t           0        1        2        3
        the drafter reads    (x1,f0)  (x2,f1)  (x3,f2)  (x4,f3)
        and predicts         f̂1       f̂2       f̂3       f̂4
        """
        features = self.features.read(batch)  # (batch, length, hidden)
        read = features[:, :-1]
        if model.training:
            read = add_noise(read, self.args.feature_noise, self.args.process_index)
        embeddings = self.target.embed(batch["input_ids"][:, 1:])
        position_ids = batch.get("position_ids")
        positions = None if position_ids is None else position_ids[:, :-1]
        # not under no_grad in a head's stage: DDP prepares its gradients in this forward pass
        predicted = unroll(model, embeddings, read, num_steps, positions)
        return Unrolled(predicted, features, batch["labels"], position_ids)

    def losses(self, drafter: CoralDrafter, trained: Trained) -> Losses:
        """Compute the losses of the stage: of the drafter, its router, its low-rank head."""
        stage, head = self.args.stage, self.target.head
        if stage == "low_rank":
            assert drafter.heads.low_rank is not None, "the stage has added one"
            squeezed = drafter.heads.low_rank(trained.predicted)  # (steps, positions, hidden)
            return low_rank_losses(trained._replace(predicted=squeezed), head)
        losses = Losses({}, {})
        if stage in ("drafter", "joint"):
            losses += drafter_losses(trained, self.args, head)
        if stage in ("router", "joint"):
            router = drafter.heads.router
            assert router is not None, "the stage has added one"
            log_mass = router(trained.predicted)  # (steps, positions, groups)
            groups = router.groups_of(drafter.config.vocab_size)
            weight = self.args.router_weight if stage == "joint" else 1.0
            losses += router_losses(log_mass, trained.target, head, groups, weight)
        return losses


def add_noise(features: Tensor, scale: float, process: int) -> Tensor:
    """Add uniform noise to features that a drafter reads in training (EAGLE, data augmentation).

    Torch's own generator, whose state is in every checkpoint, draws the seed. It is the same in all
    processes, to agree on the order of the data, so each process draws its noise from another one.

    Args:
        features: (batch, length, hidden).
        scale: the largest magnitude; 0 leaves features as they are.
        process: index of the process.

    Returns:
        (batch, length, hidden).
    """
    if not scale:
        return features
    seed = seed_of(int(torch.randint(2**40, (), device="cpu")), process)
    generator = torch.Generator(features.device).manual_seed(seed)
    noise = torch.empty_like(features)
    return features + noise.uniform_(-scale, scale, generator=generator)


register_step("coral", CoralStep)
