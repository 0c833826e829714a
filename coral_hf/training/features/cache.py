"""A feature cache: the index of its files, and its rows as a memory-mapped dataset.

    features.json             what the features depend on, written first
    features.jsonl            a shard a line, appended when its file is whole
    features-00000.safetensors, ...

In: a folder of `write_features`. Out: rows of tokens, labels and features (length, width), or a
ValueError that names what is wrong.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ...atomic import JsonLines
from ...identity import TOKEN_COLUMNS, file_digest, identify
from ..data import CoralCollator
from .reading import TargetFeatures

INDEX, SHARDS = "features.json", "features.jsonl"
# bytes of a number, and of each layer of a token beside its numbers
FORMAT_BYTES = {"bfloat16": (2, 0), "int8": (1, 4)}
ID_BYTES = 4  # of a token id, a label or a position
# another config is off by most of its features, int8 by a hundredth and int4 by a tenth
TOLERANCE = 0.2


def token_bytes(hidden_size: int, format: str, columns: Iterable[str], num_layers: int = 1) -> int:
    """Count the bytes of a token: its features, and its number in each column of its row."""
    if format not in FORMAT_BYTES:
        raise ValueError(f"`format` is {format!r}; use one of {tuple(FORMAT_BYTES)}.")
    number, scale = FORMAT_BYTES[format]
    ids = ID_BYTES * len({*TOKEN_COLUMNS} & {*columns})
    return num_layers * (hidden_size * number + scale) + ids


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
            raise _damaged(path, f"should have {self.num_bytes} bytes and has {size}")
        if checksum and file_digest(path) != self.sha256:
            raise _damaged(path, "does not have the checksum that it was written with")


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
        if not (folder / INDEX).is_file():
            raise ValueError(f"{folder} holds no {INDEX}, so it is no feature cache.")
        try:
            shards = [Shard(**shard) for shard in JsonLines(folder / SHARDS).read()]
            fields = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            return cls(**fields | {"shards": shards, "layers": tuple(fields["layers"])})
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(folder / INDEX, f"cannot be read ({error})") from error


class CachedFeatures(Dataset):
    """Rows with `input_ids`, `attention_mask`, `labels` and `features`.

    `features` are (length, layers · hidden), of all layers or of those that `select` names. Files
    are mapped into memory, and a row is read when it is asked for. The first time, its file is
    compared with the checksum that it was written with. `lengths` are the tokens of each row.

    Args:
        folder: written by [`write_features`].
        checksums: compare all files at once.

    Raises:
        ValueError: if the cache is incomplete or damaged.
    """

    def __init__(self, folder: str | Path, checksums: bool = False):
        self.folder = Path(folder)
        self.index = FeatureIndex.read(self.folder)
        shards, self.lengths = self.index.shards, self.index.lengths
        if len(self.lengths) < self.index.num_rows:
            raise ValueError(
                f"{folder} has features of {len(self.lengths)} of {self.index.num_rows} rows; run"
                " the command that writes them again, and it resumes."
            )
        for shard in shards:
            shard.check(self.folder, checksums)
        self._files: dict[str, Any] = {}
        self._layers = self.index.layers
        # (shards,), shared with the worker processes that read rows for this one
        self._is_checked = torch.full((len(shards),), checksums).share_memory_()
        self._first_rows = [0, *accumulate(len(shard.lengths) for shard in shards)][:-1]
        # for each shard (rows + 1,), where its rows begin and end in tokens
        self._offsets = [[0, *accumulate(shard.lengths)] for shard in shards]

    def __len__(self) -> int:
        return self.index.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        row = range(len(self))[row]  # an IndexError beyond the last row
        number = bisect_right(self._first_rows, row) - 1
        file, place = self.file(number), row - self._first_rows[number]
        part = slice(*self._offsets[number][place : place + 2])
        found = {name: file.get_slice(name)[part] for name in file.keys()}  # noqa: SIM118
        tokens = {name: found[name].tolist() for name in TOKEN_COLUMNS if name in found}
        features = decode(found["features"], found.get("scales"))
        if (held := self.index.layers) != self._layers:
            parts = features.unflatten(-1, (len(held), -1))
            features = parts[:, [held.index(layer) for layer in self._layers]].flatten(-2)
        return {**tokens, "attention_mask": [1] * len(tokens["input_ids"]), "features": features}

    def __getstate__(self) -> dict[str, Any]:
        # a worker process opens the files itself
        return {**self.__dict__, "_files": {}}

    @property
    def is_packed(self) -> bool:
        """Whether its rows hold several documents."""
        return "position_ids" in self[0]

    def select(self, layers: tuple[int, ...]) -> None:
        """Give the features of these layers alone, of those that the cache holds.

        Raises:
            ValueError: if it lacks one of them.
        """
        if not {*layers} <= {*self.index.layers}:
            raise ValueError(
                f"The features in {self.folder} are those of layers {[*self.index.layers]}, but the"
                f" drafter is trained on layers {[*layers]}; write others (--recipe or --from)."
            )
        self._layers = layers

    def check_target(self, target: PreTrainedModel) -> None:
        """Check that these are the features of a target, by its weights and by the first row.

        The row stands for what weights do not say: another config, or quantisation of the same
        weights.

        Raises:
            ValueError: if they are not.
        """
        digest, _, quantization = identify(target)
        if quantization == self.index.quantization and digest != self.index.digest:
            why = "whose weights are others, as after a fine-tuning"
        elif not self._is_first_row_of(target):
            why = "whose features of the first row are others"
        else:
            return
        raise ValueError(
            f"The features in {self.folder} are those of {self.index.target or 'a target'}, not of"
            f" the target {target.config._name_or_path or 'given'}, {why}; write a cache for it."
        )

    def _is_first_row_of(self, target: PreTrainedModel) -> bool:
        """Check that a target's features of the first row are nearly the stored ones."""
        batch = {name: part.to(target.device) for name, part in CoralCollator()([self[0]]).items()}
        found = batch.pop("features").float()  # (1, length, layers · hidden)
        expected = TargetFeatures(target, self._layers).read(batch).float()
        is_alike = found.shape == expected.shape
        return is_alike and bool((found - expected).norm() <= TOLERANCE * expected.norm())

    def file(self, number: int) -> Any:
        """Open the file of a shard, with features (tokens, layers · hidden); compare it once."""
        shard = self.index.shards[number]
        if not self._is_checked[number]:
            shard.check(self.folder, checksum=True)
            self._is_checked[number] = True
        if shard.file not in self._files:
            self._files[shard.file] = safe_open(self.folder / shard.file, "pt")
        return self._files[shard.file]


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
    """Convert what `encode` returned, (tokens, layers · hidden), to features of this shape again.

    scales: (tokens, layers).
    """
    if scales is None:
        return features
    return (features.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)


def _damaged(path: Path, what: str) -> ValueError:
    """Make the error for a file of a cache that is not as it was written."""
    return ValueError(
        f"{path} {what}; delete the folder and write the features again (`coral-hf features"
        " --check` reads every file)."
    )
