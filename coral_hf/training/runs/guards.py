"""Training stops at the first loss that is not finite, before the weights take any harm.

In: the losses of each batch and the target's features. Out: an error that names the batch, in
every process, since a process that stops alone leaves the others waiting.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..data.encoding import IGNORED

SHOWN_TOKENS = 8


class Watched(NamedTuple):
    """What is kept of a batch until its optimizer step."""

    input_ids: Tensor  # (batch, length)
    labels: Tensor  # (batch, length)
    finite_features: Tensor  # (positions,), whether the target's feature is finite
    losses: Tensor  # (terms,)
    names: list[str]  # of the terms


class FiniteGuard(TrainerCallback):
    """Raises a `FloatingPointError` instead of an optimizer step on losses that are not finite.

    The losses of all accumulated batches and all processes are read once a step.
    """

    def __init__(self, process: int, gather: Callable[[Tensor], Tensor]):
        """`gather` joins a tensor (1,) of every process to (processes,)."""
        self._process = process
        self._gather = gather
        self._watched: list[Watched] = []

    def watch(
        self,
        input_ids: Tensor,
        labels: Tensor,
        features: Tensor,
        losses: Mapping[str, Tensor],
    ) -> None:
        """Keep what a batch is judged by.

        Args:
            input_ids, labels: (batch, length).
            features: (positions, hidden), the target's.
            losses: name → ().
        """
        terms = torch.stack([loss.detach().float() for loss in losses.values()])
        finite = features.isfinite().all(-1)
        self._watched.append(Watched(input_ids, labels, finite, terms, [*losses]))

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback`]."""
        watched, self._watched = self._watched, []
        finite = torch.stack([batch.losses.isfinite().all() for batch in watched])
        found = self._gather(~finite.all()[None]).tolist()
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
    finite = batch.losses.isfinite().tolist()
    names = [name for name, is_finite in zip(batch.names, finite, strict=True) if not is_finite]
    where = _rows(batch, [*range(len(lengths))])
    if sum(lengths) == 0:
        return f"Nothing is trained in {where}; leave out rows without labels."
    return (
        f"The loss ({', '.join(names)}) of {where} is not finite, though the target's features are;"
        " lower `learning_rate` or set `max_grad_norm`."
    )


def _rows(batch: Watched, rows: list[int]) -> str:
    heads = [f"{row} {batch.input_ids[row, :SHOWN_TOKENS].tolist()}" for row in rows]
    return f"{'row' if len(rows) == 1 else 'rows'} {', '.join(heads)} (first tokens)"


def check_weights(model: nn.Module, gather: Callable[[Tensor], Tensor]) -> None:
    """Raise a `FloatingPointError`, in every process, if a trained weight is not finite.

    Losses can be finite while a gradient is not, and then a step spoils the weights.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    shards = [w.to_local() if isinstance(w, DTensor) else w for w in trained]
    finite = torch.stack([shard.detach().isfinite().all() for shard in shards]).all()
    if not bool(gather(finite[None]).all()):
        raise FloatingPointError(
            "The drafter's weights are not finite, so no checkpoint is written; the last one is"
            " whole. Go on from it with a lower `learning_rate` or a lower `max_grad_norm`."
        )
