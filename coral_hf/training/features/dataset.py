"""Features as training reads them: a memory-mapped cache of rows, and the target's of a batch.

In: a folder of `write_features`, or a target and batches of the collator. Out: rows of tokens,
labels and features, or the features (batch, length, hidden), without gradient.
"""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ...identity import TOKEN_COLUMNS, identify
from ...target import read_features, reads_packed_rows
from ..data import CoralCollator
from ..steps.unroll import document_lengths
from .index import FeatureIndex, decode

# another config is off by most of its features, int8 by a hundredth and int4 by a tenth
TOLERANCE = 0.2


class TargetFeatures:
    """A reader of features, which keeps the documents of packed rows apart.

    Args:
        target: the target, on its device.
    """

    def __init__(self, target: PreTrainedModel):
        self._target = target
        self._reads_packed_rows: bool | None = None  # found out once

    def read(self, batch: dict[str, Tensor]) -> Tensor:
        """Return a batch's own features if it carries any, else the target's.

        Args:
            batch: `input_ids`, `attention_mask` and perhaps `position_ids`, each (batch, length);
                `features` (batch, length, hidden) of a cache.

        Returns:
            (batch, length, hidden).
        """
        if "features" in batch:
            return batch["features"]
        ids, positions = batch["input_ids"], batch.get("position_ids")
        if positions is not None and self._reads_packed_rows is None:
            self._reads_packed_rows = reads_packed_rows(self._target, ids.device)
        if positions is None or self._reads_packed_rows:
            return read_features(self._target, ids, batch["attention_mask"], positions)
        return self._read_by_document(ids, positions)

    def _read_by_document(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Read packed rows with a target that would look across their documents.

        Args:
            ids: (batch, length).
            positions: (batch, length), from 0 in each document.

        Returns:
            (batch, length, hidden).
        """
        lengths = [length for row in document_lengths(positions) for length in row]
        documents = ids.flatten().split(lengths)
        mask = pad_sequence([torch.ones_like(ids) for ids in documents], batch_first=True)
        padded = pad_sequence(list(documents), batch_first=True)  # (documents, longest)
        features = read_features(self._target, padded, mask)  # (documents, longest, hidden)
        return features[mask.bool()].view(*ids.shape, -1)


class CachedFeatures(Dataset):
    """Rows with `input_ids`, `attention_mask`, `labels` and `features` (length, hidden).

    Files are mapped into memory, and a row is read when it is asked for. The first time, its file
    is compared with the checksum that it was written with. `lengths` are the tokens of each row.

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
            "features": decode(found["features"], found.get("scales")),
        }

    def __getstate__(self) -> dict[str, Any]:
        # a worker process opens the files itself
        return {**self.__dict__, "_files": {}}

    @property
    def is_packed(self) -> bool:
        """Whether its rows hold several documents."""
        return "position_ids" in self[0]

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
        found = batch.pop("features").float()  # (1, length, hidden)
        expected = TargetFeatures(target).read(batch).float()
        is_alike = found.shape == expected.shape
        return is_alike and bool((found - expected).norm() <= TOLERANCE * expected.norm())

    def _file(self, number: int) -> Any:
        """Open the file of a shard, which holds features (tokens, hidden), and compare it once."""
        shard = self.index.shards[number]
        if not self._is_checked[number]:
            shard.check(self.folder, checksum=True)
            self._is_checked[number] = True
        if shard.file not in self._files:
            self._files[shard.file] = safe_open(self.folder / shard.file, "pt")
        return self._files[shard.file]
