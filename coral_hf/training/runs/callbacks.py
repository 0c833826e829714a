"""Callbacks of a training run: averages and cost, checks for finite values, pushes to the Hub.

In: the losses of each batch and the target's features; the files that `Trainer` pushes. Out:
averages by name for each log entry; tokens and seconds; an error that names the bad batch before
the weights are updated with it; the same files with our card and training record, and warnings of
failed pushes.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from ...atomic import write_json
from ...drafters.model import TRAINING_RECORD
from ...hub import Branch, CardFacts, bring_card, finish_config, write_card
from ..data.encoding import IGNORED
from ..stages import is_adapted

logger = logging.getLogger(__name__)
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


class DrafterPushes(Trainer):
    """A `Trainer` whose `push_to_hub` and `hub_strategy` publish drafters; see [`PushCallback`]."""

    def init_hf_repo(self, token: str | None = None, **kwargs) -> None:
        """See [`~transformers.Trainer.init_hf_repo`].

        Raises:
            ValueError: if another model is there, or a public repository instead of a private one.
        """
        super().init_hf_repo(token=token, **kwargs)
        if self.is_world_process_zero():
            # newer versions of transformers pass it on from `push_to_hub`
            private = kwargs.get("private")
            private = self.args.hub_private_repo if private is None else private
            branch = Branch(self.hub_model_id, self.args.hub_revision, token or self.args.hub_token)
            branch.check_vacant(private)
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            bring_card(folder, branch)

    def create_model_card(self, language=None, license=None, tags=None, **others) -> None:
        """See [`~transformers.Trainer.create_model_card`].

        A card that somebody wrote, in the folder or on the Hub, stays. `finetuned_from` is the
        target's id; `tasks`, `dataset` and `dataset_args` have no place on a drafter's card.
        """
        if is_adapted(self.drafter):  # PEFT's card: the adapter loads with PEFT
            return super().create_model_card(language, license, tags, **others)
        if not self.is_world_process_zero():
            return
        folder, target = self.args.output_dir, others.get("finetuned_from")
        repo_id = getattr(self, "hub_model_id", None) or others.get("model_name")
        facts = CardFacts(
            repo_id=repo_id or Path(folder).absolute().name,
            base_model=target,
            license=license,
            language=language,
            datasets=_as_list(others.get("dataset_tags")),
            tags=_as_list(tags),
        )
        if not write_card(folder, self.drafter, facts):
            logger.warning("%s/README.md was written by hand and stays as it is.", folder)
        finish_config(self.drafter.config, folder, target)


class PushCallback(TrainerCallback):
    """Completes the files of each checkpoint that is pushed, and warns of pushes that failed.

    `Trainer` pushes in the background and ignores the results.
    """

    def __init__(self, trainer: DrafterPushes):
        self._trainer = trainer

    def on_push_begin(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback.on_push_begin`]."""
        trainer = self._trainer
        self._report()
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if not trainer.is_in_train or is_adapted(trainer.drafter):
            return  # `push_to_hub` writes a card itself, and PEFT has another
        trainer.create_model_card()
        if checkpoint.is_dir():  # `Trainer` copies its config, and may push all of it
            finish_config(trainer.drafter.config, checkpoint)
        write_json(Path(args.output_dir, TRAINING_RECORD), trainer.drafter.training_record)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback.on_train_end`]."""
        self._report(is_last=True)

    def _report(self, is_last: bool = False) -> None:
        """Warn of each push that failed, once; at last wait for those that go on."""
        pushes = getattr(self._trainer, "push_in_progress", None)
        jobs = [] if pushes is None else pushes.jobs
        for job in [*jobs]:
            if is_last or job.done():
                jobs.remove(job)
                if (error := job.exception()) is not None:
                    # with its cause: of a large file the error itself only names the file
                    name = self._trainer.hub_model_id
                    logger.warning("A push to %s failed", name, exc_info=error)


def _as_list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])
