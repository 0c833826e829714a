"""Training steps: from a batch to its losses, one class per family of drafters.

In: a drafter's `model_type`. Out: the step that the trainer runs. A new family is added with
`register_step(model_type, factory)`.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...target import Target
from ..arguments import CoralTrainingArguments
from ..data.documents import part_begins
from ..data.encoding import IGNORED


class Trained(NamedTuple):
    """The trained positions of a batch."""

    predicted: Tensor  # (steps, positions, hidden)
    target: Tensor  # (positions, hidden), the features that were to be predicted
    lengths: list[int]  # trained positions of each document of the batch, or branch of one


class Unrolled(NamedTuple):
    """What each step of an unroll predicts of a batch.

    position t           0       1       2       3       4
    token                x0      x1      x2      x3      x4
    label                -100    -100    x2      x3      x4
    target feature       f0      f1      f2      f3      f4
    predicted            f̂1      f̂2      f̂3      f̂4
    to be compared with  f1      f2      f3      f4
    whose token is       x2      x3      x4      (x5)         trained where its label is
    """

    predicted: Tensor  # (steps, batch, length - 1, hidden), at t the prediction of feature t + 1
    features: Tensor  # (batch, length, hidden), the target's
    labels: Tensor  # (batch, length), -100 where not trained
    position_ids: Tensor | None  # (batch, length), of packed rows

    def trained(self) -> Trained:
        """Select the positions whose token, t + 2, is trained; the last has no such token."""
        # (batch, length - 1)
        is_trained = F.pad(self.labels[:, 2:] != IGNORED, (0, 1))
        if self.position_ids is None:
            lengths = is_trained.sum(1)
        else:
            part = part_begins(self.position_ids[:, :-1]).flatten().cumsum(0) - 1
            lengths = torch.bincount(part[is_trained.flatten()])
        target = self.features[:, 1:][is_trained]
        return Trained(self.predicted[:, is_trained], target, lengths.tolist())


class Losses(NamedTuple):
    """The terms of a loss, and sums to be logged; each () and summed over positions."""

    terms: dict[str, Tensor]
    notes: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The loss that is minimised, of shape ()."""
        return reduce(torch.add, self.terms.values())

    def __add__(self, other: "Losses") -> "Losses":  # type: ignore[override]
        return Losses({**self.terms, **other.terms}, {**self.notes, **other.notes})


class TrainingStep(Protocol):
    """How the trainer trains one family of drafters."""

    def unroll(self, model: nn.Module, batch: dict[str, Tensor], num_steps: int) -> Unrolled:
        """Run the drafter on a batch; every forward pass goes through `model`.

        Args:
            model: the drafter as the run wraps it (DDP, FSDP2, DeepSpeed).
            batch: of the collator, (batch, length) each; of a feature cache also `features`
                (batch, length, hidden).
        """
        ...

    def losses(self, drafter: PreTrainedModel, trained: Trained) -> Losses:
        """Compute the losses of the stage; `drafter` has no wrappers, and may run its heads."""
        ...


_FACTORIES: dict[str, Callable[[Target, CoralTrainingArguments], TrainingStep]] = {}


def register_step(model_type: str, factory: Callable[..., TrainingStep]) -> None:
    """Train drafters of a `model_type` with the step that `factory(target, args)` makes."""
    _FACTORIES[model_type] = factory


def training_step(model_type: str, target: Target, args: CoralTrainingArguments) -> TrainingStep:
    """Make the step of a family of drafters.

    Raises:
        ValueError: if none is registered for it.
    """
    if model_type not in _FACTORIES:
        raise ValueError(
            f"`model` is a {model_type!r} drafter, for which no training step is registered, only"
            f" for {sorted(_FACTORIES)}; see `coral_hf.training.steps.register_step`."
        )
    return _FACTORIES[model_type](target, args)
