"""What a feature cache will take, before anything is computed."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ...identity import identify
from .formats import BYTES
from .index import FeatureIndex, Shard

COLUMNS = ("input_ids", "labels", "position_ids")
TOKEN_BYTES = 4  # of an id or a label


@dataclass(frozen=True)
class Plan:
    """The files to be written, and what they and the run take."""

    index: FeatureIndex  # without shards
    shards: list[Shard]
    disk_bytes: int  # of the cache
    free_bytes: int  # where it is written
    memory_bytes: int  # of the run: the target's weights and the largest shard, twice

    def check_space(self, written: int = 0) -> None:
        """That the rest fits, with `written` bytes there already."""
        needed = self.disk_bytes - written
        if needed > self.free_bytes:
            raise ValueError(
                f"The features need {_gigabytes(needed)} more, but only"
                f" {_gigabytes(self.free_bytes)} are free; free some, use format='int8', or fewer"
                " rows."
            )

    def __str__(self) -> str:
        """What a person wants to know before they start."""
        return (
            f"{self.index.num_rows} rows, {self.index.num_tokens} tokens, {self.index.format}:"
            f" {_gigabytes(self.disk_bytes)} on disk in {len(self.shards)} shards"
            f" ({_gigabytes(self.free_bytes)} free); about {_gigabytes(self.memory_bytes)} of"
            " memory beside the activations"
        )


def plan_features(
    target: PreTrainedModel, rows: Any, folder: str | Path, format: str, shard_bytes: int
) -> Plan:
    """Count what `write_features` will write.

    Args:
        rows: of `prepare_dataset`, packed or not.
        format: 'bfloat16' or 'int8'.
        shard_bytes: of a file, about.
    """
    if format not in BYTES:
        raise ValueError(f"`format` is {format!r}; use one of {tuple(BYTES)}.")
    if shard_bytes < 1:
        raise ValueError(f"`shard_bytes` is {shard_bytes}; use at least 1.")
    config = target.config.get_text_config(decoder=True)
    width, beside = BYTES[format]
    columns = [name for name in COLUMNS if name in rows.column_names]
    token_bytes = config.hidden_size * width + beside + TOKEN_BYTES * len(columns)
    lengths, fingerprint = _read(rows, columns)
    shards = _divide(lengths, max(shard_bytes // token_bytes, 1))
    disk = sum(lengths) * token_bytes + TOKEN_BYTES * len(lengths)
    identity = identify(target)
    index = FeatureIndex(
        target=target.config._name_or_path,
        target_digest=identity.digest,
        dtype=identity.dtype,
        quantization=identity.quantization,
        format=format,
        hidden_size=config.hidden_size,
        fingerprint=fingerprint,
        num_rows=len(lengths),
        num_tokens=sum(lengths),
        shard_bytes=shard_bytes,
    )
    weights = sum(p.numel() * p.element_size() for p in target.parameters())
    largest = max(shard.num_tokens for shard in shards) * token_bytes
    return Plan(index, shards, disk, _free(Path(folder)), weights + 2 * largest)


def _read(rows: Any, columns: Sequence[str]) -> tuple[list[int], str]:
    """The length of each row, and a fingerprint of all tokens."""
    digest, lengths = hashlib.sha256(), []
    for batch in rows.select_columns(columns).iter(batch_size=1000):
        lengths += [len(ids) for ids in batch["input_ids"]]
        for name in columns:
            digest.update(np.concatenate(batch[name]).astype(np.int32).tobytes())
    return lengths, digest.hexdigest()


def _divide(lengths: list[int], tokens: int) -> list[Shard]:
    """Rows in order, a new shard where the last one has enough tokens."""
    shards: list[Shard] = []
    for row, length in enumerate(lengths):
        if not shards or shards[-1].num_tokens >= tokens:
            shards.append(Shard(f"features-{len(shards):05}.safetensors", row, 0, 0))
        shards[-1].num_rows += 1
        shards[-1].num_tokens += length
    return shards


def _free(folder: Path) -> int:
    """Bytes free on the disk of a folder that may not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
