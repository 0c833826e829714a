"""The index of a feature cache: which target and rows it is of, its files and their checksums.

    features.json             what the features depend on, written first
    features.jsonl            a shard a line, appended when its file is whole
    features-00000.safetensors, ...

In: a folder. Out: its FeatureIndex, or a ValueError that names what is wrong.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...atomic import PARTIAL, WRITER, JsonLines
from ...identity import TOKEN_COLUMNS, file_digest

INDEX, SHARDS = "features.json", "features.jsonl"
# bytes of a number, and of each layer of a token beside its numbers
FORMAT_BYTES = {"bfloat16": (2, 0), "int8": (1, 4)}
ID_BYTES = 4  # of a token id, a label or a position


def token_bytes(hidden_size: int, format: str, columns: Iterable[str], num_layers: int = 1) -> int:
    """Count the bytes of a token: its features, and its number in each column of its row."""
    if format not in FORMAT_BYTES:
        raise ValueError(f"`format` is {format!r}; use one of {tuple(FORMAT_BYTES)}.")
    number, scale = FORMAT_BYTES[format]
    return num_layers * (hidden_size * number + scale) + ID_BYTES * len(
        {*TOKEN_COLUMNS} & {*columns}
    )


class Shard(NamedTuple):
    """A file of whole rows."""

    file: str
    lengths: list[int]  # (rows,) tokens of each
    num_bytes: int
    sha256: str
    squares: float  # sum of the squared features
    lost: float  # sum of the squares of what storing changed

    def check(self, folder: Path, checksum: bool = False) -> None:
        """Raise a ValueError if the file lacks bytes or, by its checksum, has others.

        Args:
            checksum: compare it, which reads all of the file.
        """
        path = folder / self.file
        size = path.stat().st_size if path.is_file() else None
        if size != self.num_bytes:
            raise damaged(path, f"should have {self.num_bytes} bytes and has {size}")
        if checksum and file_digest(path) != self.sha256:
            raise damaged(path, "does not have the checksum that it was written with")


@dataclass(frozen=True)
class FeatureIndex:
    """What a cache holds; `shards` are those that are written."""

    target: str  # name or path
    digest: str  # of its weights
    dtype: str  # that they had
    quantization: str | None  # how they were packed
    format: str  # of `FORMAT_BYTES`
    fingerprint: str  # of all tokens and labels
    num_rows: int
    shard_bytes: int  # of a file, about
    shards: list[Shard]
    layers: tuple[int, ...]  # of the target's `hidden_states`, side by side

    @property
    def lengths(self) -> list[int]:
        """(rows,): tokens of each row that is written."""
        return [length for shard in self.shards for length in shard.lengths]

    @property
    def lost(self) -> float:
        """Root mean square of the storage error, relative to that of the features."""
        total = sum(shard.squares for shard in self.shards)
        return (sum(shard.lost for shard in self.shards) / total) ** 0.5 if total else 0.0

    @classmethod
    def read(cls, folder: Path) -> "FeatureIndex":
        """Read the index of a folder.

        Raises:
            ValueError: if it has none, or one that cannot be read.
        """
        _check_is_cache(folder)
        try:
            shards = [Shard(**shard) for shard in JsonLines(folder / SHARDS).read()]
            fields = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            return cls(**fields | {"shards": shards, "layers": tuple(fields["layers"])})
        except (ValueError, TypeError, KeyError) as error:
            raise damaged(folder / INDEX, f"cannot be read ({error})") from error


def encode(features: Tensor, format: str, num_layers: int = 1) -> dict[str, Tensor]:
    """Convert features to what is stored: bf16, or int8 with a scale for each token and layer.

    Args:
        features: (tokens, layers · hidden).
        format: of `FORMAT_BYTES`.

    Returns:
        `features` (tokens, layers · hidden), and of int8 `scales` (tokens, layers).
    """
    if format == "bfloat16":
        return {"features": features.to(torch.bfloat16).contiguous()}
    parts = features.float().unflatten(-1, (num_layers, -1))
    scales = parts.abs().amax(-1).clamp(min=1e-12) / 127  # (tokens, layers)
    rounded = (parts / scales[..., None]).round().to(torch.int8)
    return {"features": rounded.flatten(-2), "scales": scales}


def decode(features: Tensor, scales: Tensor | None = None) -> Tensor:
    """Convert what `encode` returned to features again.

    Args:
        features: (tokens, layers · hidden).
        scales: (tokens, layers).

    Returns:
        (tokens, layers · hidden).
    """
    if scales is None:
        return features
    return (features.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)


def damaged(path: Path, what: str) -> ValueError:
    """Make the error for a file of a cache that is not as it was written."""
    return ValueError(
        f"{path} {what}; delete the cache with `coral-hf features --delete` and write it again"
        " (`--check` reads every file)."
    )


def delete_features(folder: str | Path) -> int:
    """Delete a feature cache, whole or interrupted, and nothing else that lies in its folder.

    Returns:
        The bytes that are free now.

    Raises:
        ValueError: if the folder holds no feature cache.
    """
    folder = Path(folder)
    _check_is_cache(folder)
    # the index last, so that an interrupted deletion can be run again
    kinds = ("features-*.safetensors", f"{PARTIAL}*-features*", f"{WRITER}.*", SHARDS, INDEX)
    files = [path for kind in kinds for path in folder.glob(kind)]
    size = sum(path.stat().st_size for path in files)
    for path in files:
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
    return size


def _check_is_cache(folder: Path) -> None:
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} holds no {INDEX}, so it is no feature cache.")
