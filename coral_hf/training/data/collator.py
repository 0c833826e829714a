"""A collator that pads rows of different lengths to a batch.

In: rows of `prepare_dataset`. Out: tensors (batch, length), padded on the right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .encoding import IGNORED
from .layouts import Row


@dataclass
class CoralCollator:
    """Pad rows of [`prepare_dataset`] on the right to three tensors, each (batch, length).

    Packed rows have `position_ids` too, and rows of a feature cache `features` (batch, length,
    hidden).

    >>> batch = CoralCollator(pad_to_multiple_of=8)([dataset[0], dataset[1]])
    """

    pad_token_id: int = 0  # any id of the vocabulary: mask and labels hide it
    pad_to_multiple_of: int | None = None  # so that fewer lengths occur

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Pad rows to `input_ids`, `attention_mask`, `labels` and what else they have, by name.

        Returns:
            (batch, length) each, `features` (batch, length, hidden).
        """
        pads = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        if not pads.keys() <= rows[0].keys():
            raise ValueError(f"Rows have {[*rows[0]]}, not {[*pads]}; use `prepare_dataset`.")
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
        fills: dict[str, Sequence[int]] = {name: [pad] * length for name, pad in pads.items()}
        if "position_ids" in rows[0]:
            fills["position_ids"] = range(length)  # padding is a document of its own
        batch = {
            name: torch.tensor([[*row[name], *fill[: length - len(row[name])]] for row in rows])
            for name, fill in fills.items()
        }
        if "features" in rows[0]:
            batch["features"] = torch.stack(
                [F.pad(row["features"], (0, 0, 0, length - len(row["input_ids"]))) for row in rows]
            )
        # nothing predicts the first two tokens of a document
        positions = batch.get("position_ids", torch.arange(length)[None])  # (batch or 1, length)
        batch["labels"].masked_fill_(positions < 2, IGNORED)
        return batch
