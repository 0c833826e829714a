"""Writing a feature cache: shard by shard, each whole or not there.

In: a target, rows of `prepare_dataset`. Out: a folder of safetensors with an index. A run that was
broken off goes on with the next shard.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import CoralCollator
from ..runs.files import sole_writer
from .formats import Error, decode, encode
from .index import INDEX, UNFINISHED, FeatureIndex, Shard, sha256_of
from .online import Features
from .plan import COLUMNS, Plan, plan_features

SHARD_BYTES = 1_000_000_000


def write_features(
    target: PreTrainedModel,
    rows: Any,
    folder: str | Path,
    format: str = "bfloat16",
    batch_size: int = 8,
    shard_bytes: int = SHARD_BYTES,
) -> FeatureIndex:
    """Compute the target's features of a dataset and store them.

    Args:
        rows: a `datasets.Dataset` of `prepare_dataset`, packed or not.
        folder: new, or with the same cache half written.
        format: 'bfloat16', exact for a bf16 target; 'int8' takes half of the space, and the index
            says what it lost.
        batch_size: rows that go through the target at once.
        shard_bytes: of a file, about.

    Raises:
        ValueError: if the folder holds other features, such as those of the target before it was
            fine-tuned, or if the disk has too little room.
        OSError: if the disk is full in spite of that; the shards that are whole stay.
    """
    folder = Path(folder)
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; use at least 1.")
    plan = plan_features(target, rows, folder, format, shard_bytes)
    with sole_writer(folder):
        return _write(plan, folder, _Computing(target, rows, batch_size))


def _write(plan: Plan, folder: Path, computing: "_Computing") -> FeatureIndex:
    index = _begin(plan, folder)
    with tqdm(total=plan.index.num_tokens, unit="token", desc="Features") as progress:
        for position, shard in enumerate(plan.shards):
            if position >= len(index.shards):
                tensors, index.error = computing.shard(shard, index.format, index.error)
                with _said_if_full(folder, len(index.shards), plan):
                    _save(tensors, shard, folder)
                    index.shards.append(shard)
                    index.write(folder)
            progress.update(shard.num_tokens)
    return index


def _begin(plan: Plan, folder: Path) -> FeatureIndex:
    """The index of what is there already, or a new one."""
    if (folder / INDEX).exists():
        index = FeatureIndex.read(folder)
        index.check_same(plan.index, folder)
        index.check_files(folder)
        plan.check_space(sum(shard.num_bytes for shard in index.shards))
        return index
    if folder.exists() and any(path.name != UNFINISHED for path in folder.iterdir()):
        raise ValueError(f"{folder} holds other files; give a new folder for the features.")
    plan.check_space()
    with _said_if_full(folder, 0, plan):
        folder.mkdir(parents=True, exist_ok=True)
        plan.index.write(folder)
    return plan.index


class _Computing:
    """The tensors of shards, from a target."""

    def __init__(self, target: PreTrainedModel, rows: Any, batch_size: int):
        self._features = Features(target.eval())
        self._device = target.device
        self._rows = rows
        self._batch_size = batch_size

    def shard(self, shard: Shard, format: str, error: Error) -> tuple[dict[str, Tensor], Error]:
        """What is stored for the rows of a shard, and the error with that of these rows."""
        parts: list[dict[str, Tensor]] = []
        stop = shard.first_row + shard.num_rows
        for start in range(shard.first_row, stop, self._batch_size):
            rows = [self._rows[row] for row in range(start, min(start + self._batch_size, stop))]
            for row, features in zip(rows, self._batch(rows), strict=True):
                stored = encode(features, format)
                error = error.and_of(features, decode(stored["features"], stored.get("scales")))
                tokens = {name: torch.tensor(row[name]).int() for name in COLUMNS if name in row}
                parts.append({**tokens, **stored, "lengths": torch.tensor([len(features)]).int()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, error

    def _batch(self, rows: list[dict]) -> list[Tensor]:
        """The features of each row, (length, hidden)."""
        batch = {name: part.to(self._device) for name, part in CoralCollator()(rows).items()}
        features = self._features.of(batch).cpu()
        return [part[: len(row["input_ids"])] for part, row in zip(features, rows, strict=True)]


@contextmanager
def _said_if_full(folder: Path, num_whole: int, plan: Plan) -> Iterator[None]:
    """Say what stays, and what to do, if the disk is full."""
    try:
        yield
    except Exception as error:  # safetensors raises its own kind for a full disk
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"The disk is full. {num_whole} of {len(plan.shards)} shards are whole and stay; free"
            " some space and run the same command again",
            str(folder),
        ) from error


def _save(tensors: dict[str, Tensor], shard: Shard, folder: Path) -> None:
    """Write a shard under another name, and give it its own when it is whole."""
    aside = folder / f"{shard.file}.tmp"
    try:
        save_file(tensors, aside)
    except Exception:
        aside.unlink(missing_ok=True)
        raise
    shard.num_bytes, shard.sha256 = aside.stat().st_size, sha256_of(aside)
    os.replace(aside, folder / shard.file)
