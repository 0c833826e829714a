"""Trained positions of a batch, and the terms of a loss over them.

In: what each step of an unroll predicts of a batch. Out: the positions that are trained; losses and
notes for the log, summed over positions.
"""

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import CoralTrainingArguments
from ..data.documents import part_begins
from ..data.encoding import IGNORED
from ..losses import csra_loss


class Trained(NamedTuple):
    """The trained positions of a batch."""

    predicted: Tensor  # (steps, positions, hidden)
    target: Tensor  # (positions, hidden), the features that were to be predicted
    lengths: list[int]  # trained positions of each document of the batch, or branch of one
    tokens: Tensor  # (positions,), of the text, that a feature gives
    kept: Tensor | None = None  # (steps, positions), which of `predicted` are trained; None: all


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
    kept: Tensor | None = None  # (steps, batch, length - 1), which are trained; None: all

    def first(self, steps: int) -> "Unrolled":
        """Keep the first steps alone."""
        kept = None if self.kept is None else self.kept[:steps]
        return self._replace(predicted=self.predicted[:steps], kept=kept)

    def trained(self) -> Trained:
        """Select the positions whose token, t + 2, is trained; the last has no such token."""
        # (batch, length - 1)
        is_trained = F.pad(self.labels[:, 2:] != IGNORED, (0, 1))
        if self.position_ids is None:
            lengths = is_trained.sum(1)
        else:
            part = part_begins(self.position_ids[:, :-1]).flatten().cumsum(0) - 1
            lengths = torch.bincount(part[is_trained.flatten()])
        target, tokens = self.features[:, 1:][is_trained], self.labels[:, 1:].roll(-1, 1)
        parts = self.predicted[:, is_trained], target, lengths.tolist(), tokens[is_trained]
        return Trained(*parts, None if self.kept is None else self.kept[:, is_trained])


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


def alignment(trained: Trained, args: CoralTrainingArguments) -> Losses:
    """Compute L_csra with its weight; nothing where it has none, or there is a single step."""
    predicted, weight = trained.predicted, args.resolved.csra_weight
    if not weight or len(predicted) == 1:
        return Losses({}, {})
    if args.csra_gradient == "later_steps":
        predicted = torch.cat([predicted[:1].detach(), predicted[1:]])
    loss = csra_loss(
        predicted,
        args.csra_temperature,
        lengths=trained.lengths if args.csra_negatives == "sequence" else None,
        target=trained.target if args.csra_positives == "steps_and_target" else None,
    )
    return Losses({"csra": weight * loss}, {"csra_loss": loss})


def by_step(name: str, totals: Iterable[Tensor], first: int = 1) -> dict[str, Tensor]:
    """Name a note for each step from `first` on; a tensor of shape (steps,) → () each."""
    return {f"{name}_{step}": total for step, total in enumerate(totals, start=first)}


@torch.no_grad()
def step_similarity(predicted: Tensor) -> list[Tensor]:
    """Compare each later step's predictions with those of the first step.

    (steps, positions, hidden) → cosine similarity of each, of shape (), summed over positions
    """
    first = predicted[0].float()
    return [F.cosine_similarity(first, one.float(), -1).sum() for one in predicted[1:]]
