"""Checkpoints that are whole or absent, and runs that resume from them bit for bit.

In: what `Trainer` writes. Out: folders that appear in one move, when all is on the disk.

    run/checkpoint-2               whole, whatever happens
    run/_incomplete/checkpoint-4   being written or deleted; removed by the next run after a kill
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from ...atomic import sole_writer, write_json
from .callbacks import RunMeter, check_weights
from .run_record import RUN, check_resume, check_vacant, run_settings, run_summary

# uploads to the Hub leave out what begins with an underscore
INCOMPLETE = "_incomplete"


class AtomicCheckpoints(Trainer):
    """A `Trainer` that alone writes to its folder and never shows a half-written checkpoint.

    A subclass has the `target`, or None, and the `training_record` of the run.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # `run`, the same in all its checkpoints, `settings`, and whether it `is_unrolled`: it has
        # trained a step of several steps of the unroll
        self._run: dict[str, Any] = {}
        self._entry: dict[str, Any] = {}  # of this run in the drafter's training record
        self._is_staging = False
        self.meter = RunMeter()
        self.add_callback(self.meter)

    @property
    def drafter(self) -> Any:
        """The model that is trained, without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """See [`~transformers.Trainer.train`].

        Raises:
            ValueError: if another run writes to `output_dir`, if it holds checkpoints and the run
                does not resume, or if the run began with other settings, rows or target.
        """
        folder = self.args.output_dir
        with sole_run(folder, self.is_world_process_zero()):
            if self.is_local_process_zero():
                shutil.rmtree(Path(folder, INCOMPLETE), ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._begin(resume_from_checkpoint, trial)
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            self._update_record()
            return output

    def _begin(self, resume_from: str | bool | None, trial) -> None:
        """Identify a run that begins or resumes, and go on counting what it costs."""
        settings, folder = run_settings(self), Path(self._get_output_dir(trial))
        last = get_last_checkpoint(self.args.output_dir) if resume_from is True else resume_from

        def earlier() -> dict[str, Any]:
            if not resume_from:
                check_vacant(folder)
            known = None
            if last and Path(last).is_dir():  # else `Trainer` raises an error
                known = check_resume(Path(last), settings, folder)
            return known or {"run": uuid4().hex}

        is_main = self.is_world_process_zero()
        before = call_in_main(earlier, is_main)
        unrolled = {"is_unrolled": before.get("is_unrolled", False)}
        self._run = {"run": before["run"], "settings": settings, **unrolled}
        cost = before.get("entry", {"trained_tokens": 0, "seconds": 0.0})
        # the tokens are those of all processes
        self.meter.start(cost["trained_tokens"] if is_main else 0, cost["seconds"])

    def _update_record(self) -> None:
        """Update the entry of this run in the training record; all processes call it."""
        tokens = self.accelerator.reduce(torch.tensor(self.meter.tokens, device=self.args.device))
        self._entry.update(run_summary(self, int(tokens), self.meter.seconds))
        if not any(entry is self._entry for entry in self.training_record):
            self.training_record.append(self._entry)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """See [`~transformers.Trainer.log`]; adds the averages since the last entry."""
        if "loss" in logs:
            logs |= self.meter.take(self.accelerator.reduce)
        super().log(logs, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """See [`~transformers.Trainer.get_batch_samples`]; a finished run takes no further step."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, INCOMPLETE) if self._is_staging else folder

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint to a hidden folder, publish it in one move, then delete older ones."""
        check_weights(model, self.accelerator)
        self._update_record()
        folder = Path(self._get_output_dir(trial))
        whole = folder / f"checkpoint-{self.state.global_step}"
        staged = folder / INCOMPLETE / whole.name
        with self._failing_together(staged):
            self._stage(model, trial, staged, whole)
        with self._failing_together(staged):
            if self.is_local_process_zero() and staged.exists():  # else another node was faster
                _publish(staged, whole)
        if self.args.should_save and self.args.save_total_limit:
            self._drop_old(folder, self.args.save_total_limit)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(whole))

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
            write_json(staged / RUN, {**self._run, "entry": self._entry})

    @contextmanager
    def _failing_together(self, staged: Path) -> Iterator[None]:
        """Raise in every process if writing fails in one; this also waits for all of them."""
        error = None
        try:
            yield
        except Exception as caught:  # a full disk raises errors of torch and safetensors too
            error = caught
        reasons = [reason for reason in gather_object([error and repr(error)]) if reason]
        if not reasons:
            return
        if self.is_local_process_zero():
            shutil.rmtree(staged, ignore_errors=True)
        what = f"The checkpoint of step {self.state.global_step}"
        remedy = "Earlier checkpoints are whole; make room, then resume from the last one."
        raise write_error(what, staged.parents[1], reasons[0], remedy) from error

    def _drop_old(self, folder: Path, limit: int) -> None:
        """Delete checkpoints beyond a limit, in another folder, so that none looks half deleted."""
        best = self.state.best_model_checkpoint
        # oldest first, but the best one stands just before the newest
        checkpoints = sort_checkpoints(str(folder), use_mtime=True, best_model_checkpoint=best)
        is_best_older = best is not None and Path(best) != Path(checkpoints[-1])
        aside = folder / INCOMPLETE
        for old in map(Path, checkpoints[: -max(limit, 1 + is_best_older)]):
            aside.mkdir(exist_ok=True)
            old.rename(aside / old.name)
        shutil.rmtree(aside, ignore_errors=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_staging:  # uploads run in the background, from the final place
            super()._push_from_checkpoint(checkpoint_folder)


def last_checkpoint(folder: str | Path, resume: bool) -> str | None:
    """Find the checkpoint that a run resumes from; None where it begins, asked to resume or not."""
    return get_last_checkpoint(folder) if resume and Path(folder).is_dir() else None


@contextmanager
def sole_run(folder: str | Path, is_main: bool) -> Iterator[None]:
    """Lock a folder for a run; every process of the run enters, the main one holds the lock.

    Raises:
        ValueError: if another run holds it, in every process.
    """
    with ExitStack() as stack:
        call_in_main(lambda: stack.enter_context(sole_writer(folder)), is_main)
        yield


def call_in_main(function: Callable[[], Any], is_main: bool) -> Any:
    """Call a function in the main process; every process returns its result.

    Raises:
        ValueError: in every process, if the function raises a ValueError or an OSError.
    """
    result, refusal = None, None
    if is_main:
        try:
            result = function()
        except (ValueError, OSError) as error:
            refusal = str(error)
    result, refusal = broadcast_object_list([result, refusal])
    if refusal is not None:
        raise ValueError(refusal)
    return result


def _publish(staged: Path, whole: Path) -> None:
    """Move a checkpoint to its final name, once all of it is on the disk."""
    for path in [*staged.rglob("*"), staged]:
        flush(path)
    if whole.exists():  # of this run, which was resumed from before that point
        whole.rename(staged.with_name("replaced"))
    staged.rename(whole)
    flush(whole.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file or a folder to the disk, so that it is whole after a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(what: str, folder: Path, reason: str, remedy: str) -> OSError:
    """Return the error for something that could not be written into a folder."""
    free = shutil.disk_usage(folder).free / 2**20
    return OSError(
        f"{what} could not be written to {folder} ({reason}). {free:.0f} MiB are free there."
        f" {remedy}"
    )
