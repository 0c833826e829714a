"""The target's features of a batch, computed online or carried by a batch from a cache.

In: a batch of the collator. Out: features (batch, length, hidden), without gradient.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ...target import read_features, reads_packed_rows
from ..steps.unroll import document_lengths


class TargetFeatures:
    """A reader of features, which keeps the documents of packed rows apart.

    Args:
        target: the target, on its device.
    """

    def __init__(self, target: PreTrainedModel):
        self._target = target
        self._reads_packed_rows: bool | None = None

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
        if positions is None or self._is_packed_readable(ids.device):
            return read_features(self._target, ids, batch["attention_mask"], positions)
        return self._read_by_document(ids, positions)

    def _is_packed_readable(self, device: torch.device) -> bool:
        """Test once whether the target keeps documents of packed rows (batch, length) apart."""
        if self._reads_packed_rows is None:
            self._reads_packed_rows = reads_packed_rows(self._target, device)
        return self._reads_packed_rows

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
