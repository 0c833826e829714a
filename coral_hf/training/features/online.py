"""The target's features of a batch: computed as training goes, or read from a cache.

In: a batch of the collator. Out: features (batch, length, hidden), without gradient.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ...target import read_features, reads_packed_rows
from ..steps.unroll import document_lengths


class Features:
    """Where the features of a training come from."""

    def __init__(self, target: PreTrainedModel):
        self._target = target
        self._reads_packed_rows: bool | None = None

    def of(self, batch: dict[str, Tensor]) -> Tensor:
        """(batch, length, hidden): a batch's own features, if it carries any, else the target's."""
        if "features" in batch:
            return batch["features"]
        ids, positions = batch["input_ids"], batch.get("position_ids")
        if positions is None or self._is_packed_readable(ids.device):
            return read_features(self._target, ids, batch["attention_mask"], positions)
        return self._by_document(ids, positions)

    def _is_packed_readable(self, device: torch.device) -> bool:
        if self._reads_packed_rows is None:
            self._reads_packed_rows = reads_packed_rows(self._target, device)
        return self._reads_packed_rows

    def _by_document(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Features of packed rows from a target that would look across their documents.

        `ids`, `positions`: (batch, length); → (batch, length, hidden).
        """
        lengths = [length for row in document_lengths(positions) for length in row]
        documents = ids.flatten().split(lengths)
        mask = pad_sequence([torch.ones_like(ids) for ids in documents], batch_first=True)
        padded = pad_sequence(list(documents), batch_first=True)
        features = read_features(self._target, padded, mask)  # (documents, longest, hidden)
        return features[mask.bool()].view(*ids.shape, -1)
