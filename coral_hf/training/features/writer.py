"""Writing of a feature cache, shard by shard, each whole or absent.

In: a target, rows of `prepare_dataset`. Out: a plan of what it takes, or a folder of safetensors
with an index. An interrupted run resumes with the next shard.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as arrow
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ...atomic import JsonLines, free_bytes, keep_settings, new_file, shown_bytes, sole_writer
from ...identity import TOKEN_COLUMNS, file_digest, identify, rows_digest
from ...target import FEATURE
from ..data import CoralCollator
from .cache import INDEX, SHARDS, FeatureIndex, Shard, decode, encode, token_bytes
from .reading import TargetFeatures

SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True)
class FeaturePlan:
    """The files to be written, and what they and the run take."""

    folder: Path
    format: str
    shards: list[list[int]]  # (shards, rows) tokens of each row
    token_bytes: int

    @property
    def disk_bytes(self) -> int:
        """Bytes of the cache."""
        return self.token_bytes * sum(map(sum, self.shards))

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory of the run beside the target: the largest shard twice."""
        return 2 * self.token_bytes * max(map(sum, self.shards))

    def __str__(self) -> str:
        return (
            f"{sum(map(len, self.shards))} rows, {sum(map(sum, self.shards))} tokens,"
            f" {self.format}: {shown_bytes(self.disk_bytes)} on disk in {len(self.shards)} shards"
            f" ({shown_bytes(free_bytes(self.folder))} free); {shown_bytes(self.memory_bytes)} of"
            " memory beside the target and its activations"
        )

    def check_room(self, written: int) -> None:
        """Raise a ValueError if what is not written yet does not fit where the folder will be."""
        needed, free = self.disk_bytes - written, free_bytes(self.folder)
        if needed > free:
            raise ValueError(
                f"The features need {shown_bytes(needed)} more, but only {shown_bytes(free)} are"
                f" free at {self.folder}; use format='int8' or fewer rows, or no cache."
            )


def plan_features(
    target: PreTrainedConfig,
    rows: Any,
    folder: str | Path,
    format: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    layers: tuple[int, ...] = (FEATURE,),
) -> FeaturePlan:
    """Count what [`write_features`] will write of a target with this config."""
    hidden_size = target.get_text_config(decoder=True).hidden_size
    one = token_bytes(hidden_size, format, rows.column_names, len(layers))
    lengths = row_lengths(rows)
    # a shard has the rows that begin within its share of the tokens
    shard_of = (lengths.cumsum() - lengths) // max(shard_bytes // one, 1)  # (rows,)
    shards = np.split(lengths, np.flatnonzero(np.diff(shard_of)) + 1)
    return FeaturePlan(Path(folder), format, [shard.tolist() for shard in shards], one)


def row_lengths(rows: Any) -> np.ndarray:
    """Return the tokens of each row of a `datasets.Dataset`, (rows,)."""
    batches = rows.with_format("arrow").select_columns("input_ids").iter(batch_size=1000)
    return np.concatenate([arrow.list_value_length(b["input_ids"]).to_numpy() for b in batches])


def write_features(
    target: PreTrainedModel,
    rows: Any,
    folder: str | Path,
    format: str = "bfloat16",
    batch_size: int = 8,
    shard_bytes: int = SHARD_BYTES,
    layers: tuple[int, ...] = (FEATURE,),
) -> FeatureIndex:
    """Compute the target's features of a dataset and store them.

    Args:
        target: the target, on its device.
        rows: a `datasets.Dataset` of `prepare_dataset`, packed or not.
        folder: new, or with the same cache partly written.
        format: 'bfloat16', exact for a bf16 target; 'int8' takes half of the space, and the index
            holds what it lost.
        batch_size: rows that go through the target at once.
        shard_bytes: of a file, about.
        layers: of the target's `hidden_states` that a drafter's training step reads.

    Raises:
        ValueError: if the folder holds other features, such as those of the target before it was
            fine-tuned, or if the disk has too little room.
    """
    folder = Path(folder)
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; use at least 1.")
    plan = plan_features(target.config, rows, folder, format, shard_bytes, layers)
    settings = {
        "target": target.config._name_or_path,
        **identify(target.eval())._asdict(),
        "format": format,
        "fingerprint": rows_digest(rows),
        "num_rows": len(rows),
        "shard_bytes": shard_bytes,
        "layers": layers,
    }
    if not (folder / INDEX).exists() and any(folder.glob("[!_.]*")):
        raise ValueError(f"{folder} holds other files; give a new folder for the features.")
    with sole_writer(folder):
        keep_settings(folder / INDEX, settings, folder)
        JsonLines(folder / SHARDS).mend()
        done = FeatureIndex.read(folder)
        for shard in done.shards:
            shard.check(folder)
        plan.check_room(sum(shard.num_bytes for shard in done.shards))
        first, start = len(done.lengths), len(done.shards)
        left = tqdm(plan.shards[start:], "Features", unit="file")
        for number, lengths in enumerate(left, start):
            part = rows.select(range(first, first + len(lengths)))
            path = folder / f"features-{number:05}.safetensors"
            shard = _write_shard(TargetFeatures(target, layers), part, path, format, batch_size)
            JsonLines(folder / SHARDS).append([shard._asdict()])
            first += len(lengths)
        return FeatureIndex.read(folder)


def _write_shard(reader: TargetFeatures, rows: Any, path: Path, format: str, size: int) -> Shard:
    """Compute and store the features of some rows, (tokens, layers · hidden), `size` at once."""
    collate, device = CoralCollator(), reader.target.device
    parts: list[dict[str, Tensor]] = []
    squares = lost = 0.0
    for start in range(0, len(rows), size):
        batch = [rows[row] for row in range(start, min(start + size, len(rows)))]
        inputs = {name: part.to(device) for name, part in collate(batch).items()}
        for row, padded in zip(batch, reader.read(inputs).cpu(), strict=True):
            features = padded[: len(row["input_ids"])]  # (length, layers · hidden)
            stored = encode(features, format, len(reader.layers))
            squares += float(features.double().square().sum())
            lost += float((features.double() - decode(**stored).double()).square().sum())
            tokens = {name: torch.tensor(row[name]).int() for name in TOKEN_COLUMNS if name in row}
            parts.append({**tokens, **stored})
    with new_file(path) as partial:
        save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, partial)
        num_bytes, sha256 = partial.stat().st_size, file_digest(partial)
    lengths = [len(part["input_ids"]) for part in parts]
    return Shard(path.name, lengths, num_bytes, sha256, squares, lost)
