"""Identity and summary of a training run.

In: the settings, rows and target of a run. Out: what a checkpoint's `coral_run.json` holds, with
which a run resumes or is refused; the entry of a run in `training_record.json`.
"""

import json
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import Trainer
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from ...identity import identify, rows_digest
from ...measure.report import hardware_name
from ..arguments import Recipe
from ..features import CachedFeatures

logger = logging.get_logger(__name__)

# in each checkpoint: `run`, an id, `settings`, `is_unrolled`, and `entry`, the `run_summary` so far
RUN = "coral_run.json"
SETTINGS = (
    # of the losses
    *("loss", "stage", *Recipe._fields, "top_k", "router_weight", "feature_noise"),
    *("csra_temperature", "csra_negatives", "csra_positives", "csra_gradient"),
    # of the optimizer, which takes its own from the checkpoint
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    # of the batches and their order
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *("packing", "share_prompts", "max_length"),
    *("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last"),
)
GROUPS = ("num_groups", "grouping", "grouping_hash")  # of a router that is trained
LENGTHS = ("max_steps", "num_train_epochs")
# schedules that do not depend on the length of a run
STEADY = ("constant", "constant_with_warmup")
SHOWN_DIGITS = 16  # of a SHA-256
HUB_DATASET = "hf://datasets/"


def _read_run(checkpoint: Path) -> dict[str, Any] | None:
    """Return what a checkpoint says of its run; None where another trainer wrote it."""
    file = checkpoint / RUN
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def run_settings(trainer: Trainer) -> dict[str, Any]:
    """Return what decides the outcome of a run, by name, as plain values; all processes call it."""
    args, target = trainer.args, None
    if trainer.target is not None:
        found = identify(trainer.target.model)
        packed = "" if found.quantization is None else f", quantised by {found.quantization}"
        target = f"in {found.dtype}{packed}, SHA-256 {found.digest[:SHOWN_DIGITS]}"
    values, by_steps = args.to_dict(), args.max_steps > 0
    settings = {
        # older versions of transformers lack some of them
        **{name: values[name] for name in SETTINGS if name in values},
        "max_steps": args.max_steps if by_steps else None,
        "num_train_epochs": None if by_steps else args.num_train_epochs,
        "processes": args.world_size,
        "rows": rows_identity(trainer.train_dataset),
        "target": target,
    }
    if values.get("stage") in ("router", "joint"):
        settings |= {name: getattr(trainer.drafter.config, name) for name in GROUPS}
    return json.loads(json.dumps(settings, default=str))


def rows_identity(rows: Any) -> str:
    """Describe rows by their number and a digest of their tokens, labels and positions.

    A stream has neither; other rows than a `datasets.Dataset` or a feature cache have no digest.
    """
    if not isinstance(rows, Sized):
        return "a stream"
    if isinstance(rows, CachedFeatures):
        digest = rows.index.fingerprint
    elif isinstance(rows, Dataset) and "input_ids" in rows.column_names:
        digest = rows_digest(rows)
    else:
        return f"{len(rows)} rows"
    return f"{len(rows)} rows, SHA-256 {digest[:SHOWN_DIGITS]}"


def check_vacant(folder: Path) -> None:
    """Raise a ValueError for a folder with checkpoints: a later resume would mix two runs."""
    found = sort_checkpoints(str(folder))
    if found:
        raise ValueError(
            f"`output_dir` {folder} holds {Path(found[-1]).name} of an earlier run. Resume that run"
            " (resume_from_checkpoint=True; --resume), use another folder, or delete them."
        )


def check_resume(checkpoint: Path, settings: dict, folder: Path) -> dict[str, Any] | None:
    """Return what a checkpoint says of its run, which resumes with `settings` in `folder`.

    Raises:
        ValueError: if it began with other settings, or `folder` holds checkpoints of other runs.
    """
    run = _read_run(checkpoint)
    if run is None:
        logger.warning(f"{checkpoint} does not name the settings of its run; none is compared.")
        return None
    for path in map(Path, sort_checkpoints(str(folder))):
        other = _read_run(path)
        if other is not None and other["run"] != run["run"]:
            raise ValueError(
                f"`output_dir` {folder} holds {path.name} of another run than {checkpoint}. Delete"
                " or move the checkpoints of one of them, or use another folder."
            )
    then = run["settings"]
    changed = {
        name: f"`{name}` was {then[name]}, now it is {now}"
        for name, now in settings.items()
        if name in then and then[name] != now
    }
    length = [changed.pop(name) for name in LENGTHS if name in changed]
    is_alone = settings.get("stage") in ("drafter", "joint") and not run.get("is_unrolled")
    is_share = is_alone and settings["num_steps"] > 1 and settings["single_step_share"]
    is_share = is_share or 0 < settings["warmup_steps"] < 1
    if length and (settings["lr_scheduler_type"] not in STEADY or is_share):
        logger.warning(
            f"The run of {checkpoint} resumes with another length ({'; '.join(length)}): it"
            " now follows the schedule of the new length."
        )
    if changed:
        raise ValueError(
            f"The run of {checkpoint} began otherwise: {'; '.join(changed.values())}. Resume it"
            " with the former values, or begin another run with this model (--from)."
        )
    return run


def run_summary(trainer: Trainer, tokens: int, seconds: float) -> dict[str, Any]:
    """Return what a run did and cost so far, as plain values: recipe, data, steps, hardware.

    Args:
        tokens: trained positions in all processes.
    """
    args, state = trainer.args, trainer.state
    rows, tokenizer = trainer.train_dataset, trainer.processing_class
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    name = "eval_acceptance_length"
    lengths = [entry[name] for entry in state.log_history if name in entry] or [None]
    hardware = hardware_name(args.device)
    if args.world_size > 1:
        hardware = f"{args.world_size} processes, each on {hardware}"
    return {
        **args.method,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "learning_rate": args.learning_rate,
        "max_length": args.max_length,
        "datasets": hub_datasets(rows),
        "rows": len(rows) if isinstance(rows, Sized) else None,  # of a stream
        "has_chat_template": bool(tokenizer is not None and tokenizer.chat_template),
        "steps": state.global_step,
        "epochs": round(state.epoch or 0.0, 3),
        "batch": batch,
        name: lengths[-1],
        "trained_tokens": tokens,
        "seconds": round(seconds, 1),
        "hardware": hardware,
        "versions": {"transformers": transformers.__version__, "torch": str(torch.__version__)},
    }


def hub_datasets(rows: Any) -> list[str]:
    """Return the ids of the Hub datasets that rows come from; local files are left out.

    `datasets` notes where it downloaded from: hf://datasets/org/name@commit/file.
    """
    found = rows.info.download_checksums if isinstance(rows, Dataset) else None
    names = (url.removeprefix(HUB_DATASET) for url in found or {} if url.startswith(HUB_DATASET))
    return list(dict.fromkeys(name.partition("@")[0] for name in names))
