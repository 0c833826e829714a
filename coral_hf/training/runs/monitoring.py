"""Monitoring of a training run: averages for the log, its cost, and checks for finite values.

In: the losses of each batch and the target's features. Out: averages by name for each log entry;
tokens and seconds; an error that names the bad batch before the weights are updated with it.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..data.encoding import IGNORED

SHOWN_TOKENS = 8


class RunMeter(TrainerCallback):
    """Averages since the last log entry, and what a run has cost with all its interruptions.

    Sums stay on their device until they are logged. A checkpoint ends a log entry, so that a run
    that resumes from it has none to continue.
    """

    def __init__(self) -> None:
        self.start()

    def start(self, tokens: int = 0, seconds: float = 0.0) -> None:
        """Begin to count, from what the run has cost before it was interrupted."""
        self.tokens = tokens  # trained positions of this process
        self._start = time.perf_counter() - seconds
        # sums of shape () each, and the positions that are summed
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback`]."""
        may_save = args.save_strategy == "best" and control.should_evaluate
        if (control.should_save or may_save) and args.logging_strategy != "no":
            control.should_log = True

    on_epoch_end = on_step_end

    @property
    def seconds(self) -> float:
        """How long the run has taken so far."""
        return time.perf_counter() - self._start

    def add(self, totals: dict[str, Tensor], count: int) -> None:
        """Add a batch's sums over `count` positions, each of shape ()."""
        self.tokens += count
        for name, total in totals.items():
            before, counted = self._sums.get(name, (0.0, 0))
            self._sums[name] = total.detach().float() + before, counted + count

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the averages since the last call.

        Args:
            reduce: sums a tensor of shape (2, names) over processes.
        """
        if not self._sums:
            return {}
        found, self._sums = self._sums, {}
        totals, counts = zip(*found.values(), strict=True)
        sums = torch.stack(totals)  # (names,)
        sums, counted = reduce(torch.stack([sums, sums.new_tensor(counts)]))
        return dict(zip(found, (sums / counted.clamp(min=1)).tolist(), strict=True))


class FiniteGuard(TrainerCallback):
    """Raises a `FloatingPointError` instead of an optimizer step on losses that are not finite.

    It does so in every process, since one that stopped alone would leave the others waiting. The
    losses of all accumulated batches are read from the device once a step.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        # of each batch since the last step: ids, labels, which features are finite, losses
        self._watched: list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]] = []

    def watch(self, batch: dict[str, Any], features: Tensor, losses: dict[str, Tensor]) -> None:
        """Note the losses of a batch, and which of its features are finite.

        Args:
            batch: with `input_ids` and `labels`, (batch, length) each.
            features: (positions, hidden), the target's.
            losses: by name, of shape () each.
        """
        found = {name: loss.detach() for name, loss in losses.items()}
        features = features.isfinite().all(-1)
        self._watched.append((batch["input_ids"], batch["labels"], features, found))

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback`]."""
        watched, self._watched = self._watched, []
        losses = [loss for *_, found in watched for loss in found.values()]
        if are_finite(losses, self._accelerator):
            return
        step = state.global_step
        findings = [
            f"{_finding(*batch)} It is batch {index} of optimizer step {step + 1} in process"
            f" {args.process_index}; the weights are still those of step {step}."
            for index, batch in enumerate(watched, start=1)
            if not all(loss.isfinite() for loss in batch[-1].values())
        ]
        raise FloatingPointError(gather_object(findings)[0])


def _finding(ids: Tensor, labels: Tensor, features: Tensor, losses: dict[str, Tensor]) -> str:
    """Describe what is not finite, and in which rows of a batch.

    Args:
        ids, labels: (batch, length).
        features: (positions,), whether the target's feature is finite.
        losses: by name, of shape () each.
    """
    # the first two labels of a row are never trained
    lengths = (labels[:, 2:] != IGNORED).sum(1).tolist()
    spans = features.split(lengths)
    broken = [row for row, span in enumerate(spans) if not bool(span.all())]
    rows = broken or range(len(lengths))
    starts = [f"{row} {ids[row, :SHOWN_TOKENS].tolist()}" for row in rows]
    where = f"rows {', '.join(starts)} (first tokens)"
    if broken:
        return (
            f"The target's features are not finite in {where}; use a target in bfloat16 or"
            " float32, or leave these rows out."
        )
    if sum(lengths) == 0:
        return f"Nothing is trained in {where}; leave out rows without labels."
    names = [name for name, loss in losses.items() if not loss.isfinite()]
    return (
        f"The loss ({', '.join(names)}) of {where} is not finite, though the target's features are;"
        " lower `learning_rate` or `max_grad_norm`."
    )


def are_finite(tensors: list[Tensor], accelerator: Accelerator) -> bool:
    """Whether all numbers of tensors of any shape are finite, in all processes."""
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
    return bool(accelerator.gather(finite[None].to(accelerator.device)).all())  # of (processes,)


def check_weights(model: nn.Module, accelerator: Accelerator) -> None:
    """Raise a `FloatingPointError`, in every process, if a trained weight is not finite.

    Losses can be finite while a gradient is not, and then a step spoils the weights.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    shards = [w.to_local() if isinstance(w, DTensor) else w for w in trained]
    if not are_finite(shards, accelerator):
        raise FloatingPointError(
            "The drafter's weights are not finite, so no checkpoint is written. Train in another"
            " folder from the last one, with a lower `learning_rate` or `max_grad_norm`."
        )
