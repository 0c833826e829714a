"""A feature cache as a dataset of the trainer, read where it lies on disk."""

from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..data import CoralCollator
from ..features import Features
from .formats import decode
from .index import FeatureIndex
from .plan import COLUMNS

# a cache of another target is off by all of its features, one of int8 by a hundredth
TOLERANCE = 0.2


class CachedFeatures(Dataset):
    """Rows with `input_ids`, `attention_mask`, `labels` and `features` (length, hidden).

    Files are mapped into memory, and a row is read when it is asked for.

    Args:
        folder: written by [`write_features`].
        checksums: compare each file with the checksum that it was written with.

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
        self._first_rows = [shard.first_row for shard in self.index.shards]
        self._offsets: list[list[int]] = []  # of the rows of each shard, in tokens
        for shard in self.index.shards:
            lengths = self._file(shard.file).get_tensor("lengths")
            self._offsets.append([0, *lengths.cumsum(0).tolist()])

    def __len__(self) -> int:
        return self.index.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"Row {row} of {len(self)}.")
        row %= len(self)
        number = bisect_right(self._first_rows, row) - 1
        shard = self.index.shards[number]
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
        """That these are the features of a target, by those of the first row.

        Raises:
            ValueError: if they are not.
        """
        row = self[0]
        batch = {name: part.to(target.device) for name, part in CoralCollator()([row]).items()}
        found = batch.pop("features")[0].float()
        expected = Features(target).of(batch)[0].float()
        is_same = found.shape == expected.shape
        if not is_same or (found - expected).norm() > TOLERANCE * expected.norm():
            raise ValueError(
                f"The features in {self.folder} are those of {self.index.target}, not of the"
                f" target {target.config._name_or_path}; write a cache for this target."
            )

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
