"""Monitoring of a training run: averages for the log, its cost, and the stop at what is not finite.

In: the losses of each batch and the target's features. Out: one number a name when an entry is
logged; tokens and seconds; an error that names the batch before the weights take any harm.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..data.encoding import IGNORED

SHOWN_TOKENS = 8


class RunningAverages:
    """Averages over trained positions between two log entries, by name.

    Sums stay on their device until they are logged.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, totals: dict[str, Tensor], count: int) -> None:
        """Add a batch's sums, each of shape (), over `count` positions."""
        for name, total in totals.items():
            self._sums[name] = total.detach().float() + self._sums.get(name, 0)
            self._counts[name] = self._counts.get(name, 0) + count

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The averages, and begin again.

        Args:
            reduce: sums a tensor (2, names) over processes, which all must have added the same
                names.
        """
        if not self._sums:
            return {}
        sums = torch.stack([*self._sums.values()])  # (names,)
        counts = sums.new_tensor([*self._counts.values()])  # (names,)
        names = [*self._sums]
        sums, counts = reduce(torch.stack([sums, counts]))
        self._sums, self._counts = {}, {}
        return dict(zip(names, (sums / counts.clamp(min=1)).tolist(), strict=True))

    def state_dict(self) -> dict[str, dict]:
        """What has been added since the last log entry."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Resume from a `state_dict`."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])


class RunCost:
    """Trained positions of this process, and the seconds of a run with all its interruptions."""

    def __init__(self) -> None:
        self.tokens = 0
        self._seconds = 0.0  # before the last start
        self._start: float | None = None

    def start(self) -> None:
        """Begin or resume."""
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long the run has taken so far."""
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._seconds + running

    def state_dict(self) -> dict[str, float]:
        """The cost so far."""
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Resume from a `state_dict`."""
        self.tokens, self._seconds = int(state["tokens"]), state["seconds"]


class Watched(NamedTuple):
    """What is kept of a batch until its optimizer step."""

    input_ids: Tensor  # (batch, length)
    labels: Tensor  # (batch, length)
    finite_features: Tensor  # (positions,), whether the target's feature is finite
    losses: Tensor  # (terms,)
    names: list[str]  # of the terms


class FiniteGuard(TrainerCallback):
    """Raises a `FloatingPointError` instead of an optimizer step on losses that are not finite.

    It does so in every process, since one that stopped alone would leave the others waiting. The
    losses of all accumulated batches are read once a step.
    """

    def __init__(self, process: int, gather: Callable[[Tensor], Tensor]):
        """`gather` joins a tensor of shape (1,) of every process to (processes,)."""
        self._process = process
        self._gather = gather
        self._watched: list[Watched] = []

    def watch(
        self, batch: Mapping[str, Any], features: Tensor, losses: Mapping[str, Tensor]
    ) -> None:
        """Keep what a batch is judged by.

        Args:
            batch: with `input_ids` and `labels`, (batch, length) each.
            features: (positions, hidden), the target's.
            losses: name → ().
        """
        terms = torch.stack([loss.detach().float() for loss in losses.values()])
        finite = features.isfinite().all(-1)
        self._watched.append(Watched(batch["input_ids"], batch["labels"], finite, terms, [*losses]))

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback`]."""
        watched, self._watched = self._watched, []
        finite = torch.stack([batch.losses.isfinite().all() for batch in watched])
        found = self._gather(~finite.all()[None]).tolist()  # shape (1,) to (processes,)
        if not any(found):
            return
        step = state.global_step + 1
        if not found[self._process]:
            others = ", ".join(str(process) for process, bad in enumerate(found) if bad)
            raise FloatingPointError(
                f"Process {others} met a loss that is not finite in optimizer step {step} and"
                " names its batch; this process stops with it."
            )
        index = finite.tolist().index(False)
        raise FloatingPointError(
            f"{_finding(watched[index])} The batch is number {index + 1} of optimizer step {step}"
            f" in process {self._process}. The weights are those of step {step - 1}, and no"
            " checkpoint was written since."
        )


def _finding(batch: Watched) -> str:
    """What is not finite, and in which rows."""
    # the first two labels of a row are never trained
    lengths = (batch.labels[:, 2:] != IGNORED).sum(1).tolist()
    spans = batch.finite_features.split(lengths)
    rows = [row for row, span in enumerate(spans) if not bool(span.all())]
    if rows:
        return (
            f"The target's features are not finite in {_rows(batch, rows)}; use a target in"
            " bfloat16 or float32, or leave these rows out."
        )
    where = _rows(batch, [*range(len(lengths))])
    if sum(lengths) == 0:
        return f"Nothing is trained in {where}; leave out rows without labels."
    finite = batch.losses.isfinite().tolist()
    names = [name for name, is_finite in zip(batch.names, finite, strict=True) if not is_finite]
    return (
        f"The loss ({', '.join(names)}) of {where} is not finite, though the target's features are;"
        " lower `learning_rate` or set `max_grad_norm`."
    )


def _rows(batch: Watched, rows: list[int]) -> str:
    starts = [f"{row} {batch.input_ids[row, :SHOWN_TOKENS].tolist()}" for row in rows]
    return f"{'row' if len(rows) == 1 else 'rows'} {', '.join(starts)} (first tokens)"


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
            "The drafter's weights are not finite, so no checkpoint is written; the last one is"
            " whole. Resume from it with a lower `learning_rate` or a lower `max_grad_norm`."
        )
