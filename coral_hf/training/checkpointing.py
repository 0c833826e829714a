"""Checkpoints that are whole or absent, and runs that go on from them bit for bit.

In: what `Trainer` writes. Out: folders that appear in one step, when all is written.

    run/checkpoint-2               whole, whatever happens
    run/_incomplete/checkpoint-4   being written or deleted; removed by the next run if it dies
"""

import os
import shutil
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from .averages import RunningAverages
from .guards import check_weights
from .noise import FeatureNoise
from .record import TrainingRecord
from .run_lock import sole_run

# uploads to the Hub leave out what begins with an underscore
INCOMPLETE = "_incomplete"


class CheckpointedTrainer(Trainer):
    """A `Trainer` that holds its folder alone and never shows a half-written checkpoint."""

    averages: RunningAverages
    noise: FeatureNoise
    record: TrainingRecord
    _is_staging = False

    def train(self, *args, **kwargs):
        """See [`~transformers.Trainer.train`].

        Raises:
            ValueError: if another run trains in `output_dir`.
        """
        with sole_run(self.args.output_dir, self.is_world_process_zero()):
            if self.is_local_process_zero():
                shutil.rmtree(Path(self.args.output_dir, INCOMPLETE), ignore_errors=True)
            self.accelerator.wait_for_everyone()
            return super().train(*args, **kwargs)

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
        reasons = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
        reasons = [reason for reason in reasons if reason is not None]
        if not reasons:
            return
        if self.is_local_process_zero():
            shutil.rmtree(staged, ignore_errors=True)
        run = staged.parents[1]
        raise OSError(
            f"The checkpoint of step {self.state.global_step} could not be written to {run}"
            f" ({reasons[0]}). {shutil.disk_usage(run).free / 2**20:.0f} MiB are free there."
            " Earlier checkpoints are whole; make room, then resume from the last one."
        ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_staging:  # it is pushed from its final place
            super()._push_from_checkpoint(checkpoint_folder)

    # The noise and what was summed up since the last log entry travel with the random numbers, of
    # which each process writes its own state and which `Trainer` reads once when a run goes on.
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
        if checkpoint is None or not self._state_file(checkpoint).is_file():
            return
        state = torch.load(self._state_file(checkpoint), map_location="cpu", weights_only=True)
        self._tr_loss = state["loss"].to(self.args.device)
        self._globalstep_last_logged = state["last_step"]
        self.averages.load_state_dict(state["averages"], self.args.device)
        self.noise.load_state_dict(state["noise"])
        self.record.load_state_dict(state["record"])

    def _state_file(self, folder: str) -> Path:
        return Path(folder, f"coral_state_{self.args.process_index}.pth")


def _publish(staged: Path, whole: Path) -> None:
    """Let a checkpoint appear under its name, once the disk has all of it."""
    if not staged.exists():  # on a shared disk, another node was faster
        return
    for path in [*staged.rglob("*"), staged]:
        _flush(path)
    replaced = staged.with_name("replaced")
    if whole.exists():  # of an earlier run, from before the point where this one began
        whole.rename(replaced)
    staged.rename(whole)
    _flush(whole.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have a file or a folder written to the disk, so that a power failure leaves it whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
