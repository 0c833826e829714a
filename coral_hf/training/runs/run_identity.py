"""Which run a checkpoint is of, and what that run began with.

In: the arguments, rows and target of a trainer. Out: a JSON file in each checkpoint, and an error
where a run would go on with others, or among the checkpoints of another run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedModel
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from ...identity import identify
from ..arguments import WEIGHTS, CoralTrainingArguments
from ..features import CachedFeatures

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

RUN = "coral_run.json"
SETTINGS = (
    # of the losses
    *("stage", "num_steps", *WEIGHTS, "top_k", "router_weight", "feature_noise"),
    *("csra_temperature", "csra_negatives", "csra_positives", "csra_gradient"),
    # of the optimizer, which takes its own from the checkpoint
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    # of the batches and their order
    *("per_device_train_batch_size", "gradient_accumulation_steps", "packing", "max_length"),
    *("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last"),
)
LENGTHS = ("max_steps", "num_train_epochs")
# schedules that do not look at the end of a run
STEADY = ("constant", "constant_with_warmup")
COLUMNS = ("input_ids", "labels", "position_ids")
SHOWN_DIGITS = 16  # of a SHA-256, enough to tell datasets and targets apart


class Run(NamedTuple):
    """What a checkpoint says of its run."""

    id: str  # the same in all checkpoints of a run, however often it was broken off
    settings: dict[str, Any]  # of `run_settings`

    def write(self, checkpoint: Path) -> None:
        """Put it into a checkpoint."""
        text = json.dumps({"run": self.id, "settings": self.settings}, indent=1)
        (checkpoint / RUN).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> Run | None:
        """That of a checkpoint; none where it was written by another trainer."""
        if not (checkpoint / RUN).is_file():
            return None
        found = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
        return cls(found["run"], found["settings"])


def run_settings(
    args: CoralTrainingArguments, rows: Any, target: PreTrainedModel
) -> dict[str, Any]:
    """What decides a run, by name, as plain values; all processes call it.

    Args:
        rows: that are trained on.
        target: wherever its weights lie.
    """
    values = args.to_dict()
    by_steps = args.max_steps > 0
    found = {
        # older versions of transformers lack some of them
        **{name: values[name] for name in SETTINGS if name in values},
        "max_steps": args.max_steps if by_steps else None,
        "num_train_epochs": None if by_steps else args.num_train_epochs,
        "processes": args.world_size,
        "rows": rows_identity(rows),
        "target": _target_identity(target),
    }
    return json.loads(json.dumps(found, default=str))


def _target_identity(target: PreTrainedModel) -> str:
    digest, dtype, quantization = identify(target)
    packed = "" if quantization is None else f", quantised by {quantization}"
    return f"in {dtype}{packed}, SHA-256 {digest[:SHOWN_DIGITS]}"


def rows_identity(rows: Any) -> str:
    """The number of rows and a digest of their tokens, labels and positions.

    Streams have neither; of what is no `datasets.Dataset` or feature cache the number has to do.
    """
    import datasets

    if not isinstance(rows, Sized):
        return "a stream"
    number = f"{len(rows)} rows"
    if isinstance(rows, CachedFeatures):
        return f"{number}, SHA-256 {rows.index.fingerprint[:SHOWN_DIGITS]}"
    if isinstance(rows, datasets.Dataset) and set(COLUMNS) & {*rows.column_names}:
        return f"{number}, SHA-256 {_digest(rows)[:SHOWN_DIGITS]}"
    return number


def _digest(rows: Dataset) -> str:
    """SHA-256 of the columns that are trained on, read as Arrow: lists would take minutes."""
    import pyarrow.compute as arrow

    found = sha256()
    names = [name for name in COLUMNS if name in rows.column_names]
    for batch in rows.with_format("arrow").select_columns(names).iter(batch_size=1000):
        for name in names:
            for part in (arrow.list_value_length(batch[name]), arrow.list_flatten(batch[name])):
                # the same numbers may be stored in other types
                found.update(part.fill_null(-1).to_numpy().astype("int64").tobytes())
    return found.hexdigest()


def check_vacant(folder: Path) -> None:
    """Refuse to begin a run among checkpoints: `--resume` would go on from one of the other run.

    Raises:
        ValueError: if there are any.
    """
    found = [Path(path).name for path in sort_checkpoints(str(folder))]
    if found:
        names = found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"
        raise ValueError(
            f"`output_dir` {folder} holds {names} of an earlier run, and a new run would be mixed"
            " with it. Go on with that run (resume_from_checkpoint=True, on the command line"
            " --resume), use another folder, or delete its checkpoints."
        )


def check_goes_on(checkpoint: Path, settings: Mapping[str, Any], folder: Path) -> str | None:
    """The id of a checkpoint's run, which goes on with `settings` and checkpoints in `folder`.

    Raises:
        ValueError: if it began with other settings, or `folder` holds checkpoints of other runs.
    """
    run = Run.read(checkpoint)
    if run is None:
        logger.warning(
            f"{checkpoint} does not say with which settings its run began; see to it that they are"
            " the same."
        )
        return None
    others = [path for path in map(Path, sort_checkpoints(str(folder))) if _is_other(path, run.id)]
    if others:
        raise ValueError(
            f"`output_dir` {folder} holds {others[0].name}, which is not of the run of"
            f" {checkpoint}. Delete or move the checkpoints of one of them, or use another folder."
        )
    _warn_of_length(checkpoint, run.settings, settings)
    changed = differences(run.settings, settings)
    if changed:
        raise ValueError(
            f"{checkpoint} is of a run that began otherwise: {'; '.join(changed)}. Go on with what"
            " it began with. To train on with something else, begin a run in another folder with"
            " the drafter of this checkpoint (on the command line --drafter)."
        )
    return run.id


def _warn_of_length(checkpoint: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say that a run goes on otherwise than it would have, had it had its length from the start."""
    changed = [_change(name, then, now) for name in LENGTHS if then.get(name) != now[name]]
    is_share = 0 < now["warmup_steps"] < 1  # of the whole run
    if changed and (now["lr_scheduler_type"] not in STEADY or is_share):
        logger.warning(
            f"The run of {checkpoint} goes on with another length ({'; '.join(changed)}): from here"
            " on its learning rate is that of the new length's schedule."
        )


def _change(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return f"`{name}` was {then.get(name)}, now it is {now[name]}"


def _is_other(checkpoint: Path, run_id: str) -> bool:
    run = Run.read(checkpoint)
    return run is not None and run.id != run_id


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed of the settings of a run but for its length, a phrase each."""
    return [
        _change(name, then, now)
        for name in now
        if name in then and name not in LENGTHS and then[name] != now[name]
    ]
