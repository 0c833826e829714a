"""Monitoring of a training run: averages for the log, its cost, and checks for finite values.

In: the losses of each batch and the target's features. Out: averages by name for each log entry;
tokens and seconds; an error that names the bad batch before the weights are updated with it.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..data.encoding import IGNORED

SHOWN_TOKENS = 8


class RunMeter:
    """Averages since the last log entry, and what a run has cost with all its interruptions.

    Sums stay on their device until they are logged.
    """

    def __init__(self) -> None:
        self.tokens = 0  # trained positions of this process
        self._sums: dict[str, Tensor] = {}  # of shape () each
        self._count = 0  # of positions that are summed
        self.start()

    def start(self) -> None:
        """Start the clock; a run that resumes then loads the state of its checkpoint."""
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long the run has taken so far."""
        return time.perf_counter() - self._start

    def add(self, totals: dict[str, Tensor], count: int) -> None:
        """Add a batch's sums over `count` positions, each of shape (); the names never change."""
        self.tokens += count
        self._count += count
        for name, total in totals.items():
            self._sums[name] = total.detach().float() + self._sums.get(name, 0)

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the averages since the last call.

        Args:
            reduce: sums a tensor of shape (names + 1,) over processes.
        """
        if not self._sums:
            return {}
        names, sums = [*self._sums], torch.stack([*self._sums.values()])  # (names,)
        sums = reduce(torch.cat([sums, sums.new_tensor([self._count])]))
        self._sums, self._count = {}, 0
        return dict(zip(names, (sums[:-1] / sums[-1].clamp(min=1)).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, of shape () each, their count, and the cost so far."""
        sums = dict(self._sums)
        return {"sums": sums, "count": self._count, "tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`, whose sums are of shape () each."""
        self._sums, self._count = dict(state["sums"]), state["count"]
        self.tokens = state["tokens"]
        self._start -= state["seconds"]


class Watched(NamedTuple):
    """The parts of a batch that are kept until its optimizer step."""

    input_ids: Tensor  # (batch, length)
    labels: Tensor  # (batch, length)
    finite_features: Tensor  # (positions,), whether the target's feature is finite
    finite_losses: dict[str, Tensor]  # of shape () each, whether the loss is finite


class FiniteGuard(TrainerCallback):
    """Raises a `FloatingPointError` instead of an optimizer step on losses that are not finite.

    It does so in every process, since one that stopped alone would leave the others waiting. The
    losses of all accumulated batches are read from the device once a step.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor]):
        """`gather` joins a tensor of shape (1,) of every process to (processes,)."""
        self._gather = gather
        self._watched: list[Watched] = []

    def watch(
        self, batch: Mapping[str, Any], features: Tensor, losses: Mapping[str, Tensor]
    ) -> None:
        """Note which features and losses of a batch are finite.

        Args:
            batch: with `input_ids` and `labels`, (batch, length) each.
            features: (positions, hidden), the target's.
            losses: by name, of shape () each.
        """
        finite = {name: loss.isfinite() for name, loss in losses.items()}
        features = features.isfinite().all(-1)
        self._watched.append(Watched(batch["input_ids"], batch["labels"], features, finite))

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback`]."""
        watched, self._watched = self._watched, []
        finite = torch.stack([torch.stack([*b.finite_losses.values()]).all() for b in watched])
        if bool(self._gather(finite.all()[None]).all()):  # shape (1,) to (processes,)
            return
        step = state.global_step
        findings = [
            f"{_finding(batch)} It is batch {index} of optimizer step {step + 1} in process"
            f" {args.process_index}; the weights are still those of step {step}."
            for index, batch in enumerate(watched, start=1)
            if not finite[index - 1]
        ]
        raise FloatingPointError(gather_object(findings)[0])


def _finding(batch: Watched) -> str:
    """Describe what is not finite, and in which rows of a batch."""
    # the first two labels of a row are never trained
    lengths = (batch.labels[:, 2:] != IGNORED).sum(1).tolist()
    spans = batch.finite_features.split(lengths)
    broken = [row for row, span in enumerate(spans) if not bool(span.all())]
    rows = broken or range(len(lengths))
    starts = [f"{row} {batch.input_ids[row, :SHOWN_TOKENS].tolist()}" for row in rows]
    where = f"rows {', '.join(starts)} (first tokens)"
    if broken:
        return (
            f"The target's features are not finite in {where}; use a target in bfloat16 or"
            " float32, or leave these rows out."
        )
    if sum(lengths) == 0:
        return f"Nothing is trained in {where}; leave out rows without labels."
    names = [name for name, is_finite in batch.finite_losses.items() if not is_finite]
    return (
        f"The loss ({', '.join(names)}) of {where} is not finite, though the target's features are;"
        " lower `learning_rate` or `max_grad_norm`."
    )


def check_weights(model: nn.Module, gather: Callable[[Tensor], Tensor]) -> None:
    """Raise a `FloatingPointError`, in every process, if a trained weight is not finite.

    Losses can be finite while a gradient is not, and then a step spoils the weights.

    Args:
        gather: joins a tensor of shape (1,) of every process to (processes,).
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    shards = [w.to_local() if isinstance(w, DTensor) else w for w in trained]
    finite = torch.stack([shard.detach().isfinite().all() for shard in shards]).all()
    if not bool(gather(finite[None]).all()):
        raise FloatingPointError(
            "The drafter's weights are not finite, so no checkpoint is written. Train in another"
            " folder from the last one, with a lower `learning_rate` or `max_grad_norm`."
        )
