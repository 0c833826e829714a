"""A feature cache as a dataset of the trainer, read where it lies on disk."""

from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ...identity import identify
from ..data import CoralCollator
from .formats import decode
from .index import FeatureIndex, damaged
from .online import Features
from .plan import COLUMNS

# another config is off by most of its features, int8 by a hundredth and int4 by a tenth
TOLERANCE = 0.2


class CachedFeatures(Dataset):
    """Rows with `input_ids`, `attention_mask`, `labels` and `features` (length, hidden).

    Files are mapped into memory, and a row is read when it is asked for. With its first row a file
    is compared with the checksum that it was written with, once in each process.

    Args:
        folder: written by [`write_features`].
        checksums: compare all files at once.

    Raises:
        ValueError: if the cache is not whole.
    """

    def __init__(self, folder: str | Path, checksums: bool = False):
        self.folder = Path(folder)
        self.index = FeatureIndex.read(self.folder)
        if not self.index.is_complete:
            written = sum(shard.num_rows for shard in self.index.shards)
            raise ValueError(
                f"{folder} has features of {written} of {self.index.num_rows} rows; run the"
                " command that writes them again, and it goes on."
            )
        self.index.check_files(self.folder, checksums)
        self._files: dict[str, Any] = {}
        # (shards,), seen by all processes that read rows for this one, however often they begin
        self._is_checked = torch.full((len(self.index.shards),), checksums).share_memory_()
        self._first_rows = [shard.first_row for shard in self.index.shards]
        self._offsets: list[list[int]] = []  # of the rows of each shard, in tokens
        for shard in self.index.shards:
            self._offsets.append([0, *self._lengths(shard.file).cumsum(0).tolist()])

    def __len__(self) -> int:
        return self.index.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"Row {row} of {len(self)}.")
        row %= len(self)
        number = bisect_right(self._first_rows, row) - 1
        shard = self.index.shards[number]
        if not self._is_checked[number]:
            shard.check_bytes(self.folder)
            self._is_checked[number] = True
        file = self._file(shard.file)
        place = row - shard.first_row
        part = slice(*self._offsets[number][place : place + 2])
        names = set(file.keys())
        tokens = {name: file.get_slice(name)[part].tolist() for name in COLUMNS if name in names}
        scales = file.get_slice("scales")[part] if "scales" in names else None
        return {
            **tokens,
            "attention_mask": [1] * len(tokens["input_ids"]),
            "features": decode(file.get_slice("features")[part], scales),
        }

    def __getstate__(self) -> dict[str, Any]:
        # a worker process opens the files anew
        return {**self.__dict__, "_files": {}}

    @property
    def lengths(self) -> list[int]:
        """(rows,): tokens of each row, for which nothing is read."""
        return [b - a for offsets in self._offsets for a, b in pairwise(offsets)]

    @property
    def is_packed(self) -> bool:
        """Whether its rows hold several documents."""
        return "position_ids" in self[0]

    def check_target(self, target: PreTrainedModel) -> None:
        """That these are the features of a target, by its weights and by the first row.

        The row stands for what weights do not say: another config or quantisation of the same ones.

        Raises:
            ValueError: if they are not.
        """
        found = identify(target)
        is_comparable = found.quantization == self.index.quantization
        if is_comparable and found.digest != self.index.target_digest:
            raise self._of_another(target, "whose weights are others, as after a fine-tuning")
        if not self._is_first_row_of(target):
            raise self._of_another(target, "which says something else of the first row")

    def _is_first_row_of(self, target: PreTrainedModel) -> bool:
        row = self[0]
        batch = {name: part.to(target.device) for name, part in CoralCollator()([row]).items()}
        found = batch.pop("features")[0].float()
        expected = Features(target).of(batch)[0].float()
        if found.shape != expected.shape:
            return False
        return bool((found - expected).norm() <= TOLERANCE * expected.norm())

    def _of_another(self, target: PreTrainedModel, why: str) -> ValueError:
        return ValueError(
            f"The features in {self.folder} are those of {self.index.target or 'a target'}, not of"
            f" the target {target.config._name_or_path or 'given'}, {why}; write a cache for this"
            " target."
        )

    def _lengths(self, name: str) -> Tensor:
        """(rows,): tokens of each row of a file."""
        try:
            return self._file(name).get_tensor("lengths")
        except (SafetensorError, OSError) as error:
            raise damaged(self.folder / name, f"cannot be read ({error})") from error

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.folder / name, "pt")
        return self._files[name]


class Outline(Dataset):
    """Rows with as many `input_ids` as those of a cache: what a sampler asks of a dataset.

    `Trainer` reads whole rows for their lengths, which here would be all features.
    """

    def __init__(self, cached: CachedFeatures):
        self._lengths = cached.lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, row: int) -> dict[str, range]:
        return {"input_ids": range(self._lengths[row])}
