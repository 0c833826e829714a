"""Checkpoints that are whole or absent, and runs that go on from them bit for bit.

In: what `Trainer` writes. Out: folders that appear in one step, when all is written.

    run/checkpoint-2               whole, whatever happens
    run/_incomplete/checkpoint-4   being written or deleted; removed by the next run if it dies
"""

import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    get_last_checkpoint,
    sort_checkpoints,
)

from ...target import Target
from ..arguments import CoralTrainingArguments
from ..steps.noise import FeatureNoise
from .averages import RunningAverages
from .guards import check_weights
from .record import TrainingRecord
from .run_identity import Run, check_goes_on, check_vacant, run_settings
from .run_lock import sole_run

# uploads to the Hub leave out what begins with an underscore
INCOMPLETE = "_incomplete"


class CheckpointedTrainer(Trainer):
    """A `Trainer` that holds its folder alone and never shows a half-written checkpoint."""

    args: CoralTrainingArguments
    averages: RunningAverages
    noise: FeatureNoise
    record: TrainingRecord
    target: Target
    _is_staging = False
    _run = Run("", {})  # that `train` begins or goes on with

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """See [`~transformers.Trainer.train`].

        Raises:
            ValueError: if another run trains in `output_dir`, if a new run would begin among the
                checkpoints of an earlier one, and if one would go on with other settings, rows or
                target than it began with.
        """
        with sole_run(self.args.output_dir, self.is_world_process_zero()):
            if self.is_local_process_zero():
                shutil.rmtree(Path(self.args.output_dir, INCOMPLETE), ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._run = self._begin(resume_from_checkpoint, trial)
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _begin(self, resume: str | bool | None, trial) -> Run:
        """The run that begins or goes on; every process has it, or raises."""
        settings = run_settings(self.args, self.train_dataset, self.target.model)
        run_id, refusal = "", None
        if self.is_world_process_zero():
            try:
                run_id = self._known_run(resume, settings, trial) or uuid4().hex
            except (ValueError, OSError) as error:
                refusal = str(error)
        run_id, refusal = broadcast_object_list([run_id, refusal])
        if refusal is not None:
            raise ValueError(refusal)
        return Run(run_id, settings)

    def _known_run(self, resume: str | bool | None, settings: dict[str, Any], trial) -> str | None:
        folder = Path(self._get_output_dir(trial))
        if not resume:
            check_vacant(folder)
            return None
        last = get_last_checkpoint(self.args.output_dir) if resume is True else resume
        # `Trainer` says what is wrong where there is none
        if last is None or not Path(last).is_dir():
            return None
        return check_goes_on(Path(last), settings, folder)

    def _run_epoch(self, *args, **kwargs) -> None:
        """A run that goes on from its last step is over; `Trainer` would take one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _gather(self, flags: torch.Tensor) -> torch.Tensor:
        """(any) → (processes * any), wherever the tensor lies."""
        return self.accelerator.gather(flags.to(self.args.device))

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, INCOMPLETE) if self._is_staging else folder

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint aside, then let it appear, and only then delete older ones."""
        check_weights(model, self._gather)
        run = Path(self._get_output_dir(trial))
        whole = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = run / INCOMPLETE / whole.name
        self._raise_together(self._attempt(self._stage, model, trial, staged, whole), staged)
        error = None
        if self.is_local_process_zero():
            error = self._attempt(_publish, staged, whole)
        self._raise_together(error, staged)
        if self.args.should_save and self.args.save_total_limit:
            self._drop_old(run, self.args.save_total_limit)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(whole))

    def _drop_old(self, run: Path, limit: int) -> None:
        """Delete what is beyond the limit, aside, so that none is ever seen half deleted."""
        best = self.state.best_model_checkpoint
        # oldest first, but the best one stands just before the newest
        checkpoints = sort_checkpoints(str(run), use_mtime=True, best_model_checkpoint=best)
        is_best_older = best is not None and Path(best) != Path(checkpoints[-1])
        for old in map(Path, checkpoints[: -max(limit, 1 + is_best_older)]):
            aside = run / INCOMPLETE
            aside.mkdir(exist_ok=True)
            old.rename(aside / old.name)
            shutil.rmtree(aside, ignore_errors=True)

    def _stage(self, model, trial, staged: Path, whole: Path) -> None:
        self._is_staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_staging = False
        if self.args.should_save:
            self._run.write(staged)
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == staged:
            self.state.best_model_checkpoint = str(whole)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    @staticmethod
    def _attempt(write, *args) -> Exception | None:
        """What went wrong, which other processes have to hear of before it is raised."""
        try:
            write(*args)
        except Exception as error:  # a full disk raises errors of torch and safetensors too
            return error
        return None

    def _raise_together(self, error: Exception | None, staged: Path) -> None:
        """Raise in every process if writing failed in one; also waits for all of them."""
        reasons = gather_object([None if error is None else reason_of(error)])
        reasons = [reason for reason in reasons if reason is not None]
        if not reasons:
            return
        if self.is_local_process_zero():
            shutil.rmtree(staged, ignore_errors=True)
        raise write_error(
            f"The checkpoint of step {self.state.global_step}",
            staged.parents[1],
            reasons[0],
            "Earlier checkpoints are whole; make room, then resume from the last one.",
        ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_staging:  # it is pushed from its final place
            super()._push_from_checkpoint(checkpoint_folder)

    # The record, the noise and what was summed up since the last log entry travel with the random
    # numbers, of which each process writes its own state and which `Trainer` reads as it goes on.
    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = {
            "loss": self._tr_loss,
            "last_step": self._globalstep_last_logged,
            "averages": self.averages.state_dict(),
            "noise": self.noise.state_dict(),
            "record": self.record.state_dict(),
        }
        torch.save(state, self._state_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or (state := self._state_of(checkpoint)) is None:
            return
        self._tr_loss = state["loss"].to(self.args.device)
        self._globalstep_last_logged = state["last_step"]
        self.averages.load_state_dict(state["averages"], self.args.device)
        self.noise.load_state_dict(state["noise"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # of a run that is over, random numbers are not read
        if checkpoint is not None and (state := self._state_of(checkpoint)) is not None:
            self.record.load_state_dict(state["record"])

    def _state_of(self, checkpoint: str) -> dict[str, Any] | None:
        """What this process wrote into a checkpoint, if it was there."""
        file = self._state_file(checkpoint)
        return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else None

    def _state_file(self, folder: str) -> Path:
        return Path(folder, f"coral_state_{self.args.process_index}.pth")


def _publish(staged: Path, whole: Path) -> None:
    """Let a checkpoint appear under its name, once the disk has all of it."""
    if not staged.exists():  # on a shared disk, another node was faster
        return
    for path in [*staged.rglob("*"), staged]:
        flush(path)
    replaced = staged.with_name("replaced")
    if whole.exists():  # of this run, which went on from before that point
        whole.rename(replaced)
    staged.rename(whole)
    flush(whole.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def flush(path: Path) -> None:
    """Have a file or a folder written to the disk, so that a power failure leaves it whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason_of(error: Exception) -> str:
    """An error as a part of a sentence."""
    return f"{type(error).__name__}: {error}"


def write_error(what: str, folder: Path, reason: str, remedy: str) -> OSError:
    """The error for what did not go into a folder."""
    free = shutil.disk_usage(folder).free / 2**20
    return OSError(
        f"{what} could not be written to {folder} ({reason}). {free:.0f} MiB are free there."
        f" {remedy}"
    )
