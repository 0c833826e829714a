"""A feature cache as training reads it: a memory-mapped dataset.

In: a folder of `write_features`. Out: rows of tokens, labels and features (length, width).
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ...identity import TOKEN_COLUMNS, identify
from ..data import CoralCollator
from .index import FeatureIndex, decode
from .reading import TargetFeatures

# another config is off by most of its features, int8 by a hundredth and int4 by a tenth
TOLERANCE = 0.2


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
        file, place = self._file(number), row - self._first_rows[number]
        part = slice(*self._offsets[number][place : place + 2])
        found = {name: file.get_slice(name)[part] for name in file.keys()}  # noqa: SIM118
        tokens = {name: found[name].tolist() for name in TOKEN_COLUMNS if name in found}
        return {
            **tokens,
            "attention_mask": [1] * len(tokens["input_ids"]),
            "features": self._selected(decode(found["features"], found.get("scales"))),
        }

    def __getstate__(self) -> dict[str, Any]:
        # a worker process opens the files itself
        return {**self.__dict__, "_files": {}}

    @property
    def is_packed(self) -> bool:
        """Whether its rows hold several documents."""
        return "position_ids" in self[0]

    def column(self, name: str) -> Iterator[Tensor]:
        """Yield a column of token ids or labels, (tokens,) of each file, without the features."""
        for number in range(len(self.index.shards)):
            yield self._file(number).get_tensor(name)

    def select(self, layers: tuple[int, ...]) -> None:
        """Give the features of these layers alone, of those that the cache holds.

        Raises:
            ValueError: if it lacks one of them.
        """
        if not {*layers} <= {*self.index.layers}:
            raise ValueError(
                f"The features in {self.folder} are those of layers {[*self.index.layers]}, but the"
                f" drafter is trained on layers {[*layers]} of its target; write a cache for it:"
                " `coral-hf features` with --recipe, or with --drafter."
            )
        self._layers = layers

    def _selected(self, features: Tensor) -> Tensor:
        """Select the layers of features (length, layers · hidden)."""
        held = self.index.layers
        if self._layers == held:
            return features
        parts = features.unflatten(-1, (len(held), -1))
        return parts[:, [held.index(layer) for layer in self._layers]].flatten(-2)

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

    def _file(self, number: int) -> Any:
        """Open the file of a shard, with features (tokens, layers · hidden); compare it once."""
        shard = self.index.shards[number]
        if not self._is_checked[number]:
            shard.check(self.folder, checksum=True)
            self._is_checked[number] = True
        if shard.file not in self._files:
            self._files[shard.file] = safe_open(self.folder / shard.file, "pt")
        return self._files[shard.file]
