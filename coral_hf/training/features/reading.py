"""The target's features of a batch, whose rows may hold several documents.

In: a target, batches of the collator. Out: features (batch, length, layers · hidden), without
gradient.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ...target import (
    CONVOLUTION,
    FEATURE,
    decoder_of,
    read_features,
    sliding_windows,
    takes_positions,
    text_config,
)
from ..data.documents import Places, has_branches, parts_of

Layers = tuple[int, ...]  # indices into a target's `hidden_states`


class TargetFeatures:
    """A reader of features, which keeps the documents of packed rows apart.

    Args:
        target: the target, on its device.
        layers: which of its `hidden_states` are read, side by side.
    """

    def __init__(self, target: PreTrainedModel, layers: Layers = (FEATURE,)):
        self.target, self.layers = target, layers
        self._reads: dict[bool, bool] = {}  # by whether there are branches; found out once

    def read(self, batch: dict[str, Tensor]) -> Tensor:
        """Return a batch's own features if it carries any, else the target's.

        Args:
            batch: `input_ids`, `attention_mask` and perhaps `position_ids`, each (batch, length);
                `features` (batch, length, layers · hidden) of a cache.

        Returns:
            (batch, length, layers · hidden).
        """
        if "features" in batch:
            return batch["features"]
        ids, positions = batch["input_ids"], batch.get("position_ids")
        if positions is None:
            return read_features(self.target, ids, batch["attention_mask"], layers=self.layers)
        if self._keeps_apart(positions):
            return read_documents(self.target, ids, positions, self.layers)
        return self._read_by_document(ids, positions)

    def _keeps_apart(self, positions: Tensor) -> bool:
        """Whether the target keeps the documents of such rows, (batch, length), apart."""
        kind = has_branches(positions)
        if kind not in self._reads:
            found_by = reads_branches if kind else reads_packed_rows
            self._reads[kind] = found_by(self.target, positions.device)
        return self._reads[kind]

    def _read_by_document(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Read packed rows with a target that would look across their documents.

        Args:
            ids: (batch, length).
            positions: (batch, length), from 0 in each document.

        Returns:
            (batch, length, layers · hidden).
        """
        parts = [(row, part) for row, found in enumerate(parts_of(positions)) for part in found]
        documents = [part.of(ids[row]) for row, part in parts]
        mask = pad_sequence([torch.ones_like(one) for one in documents], batch_first=True)
        padded = pad_sequence(documents, batch_first=True)  # (documents, longest)
        # (documents, longest, layers · hidden)
        features = read_features(self.target, padded, mask, layers=self.layers)
        is_own = mask.bool()
        for index, (_, part) in enumerate(parts):
            is_own[index, : part.shared] = False
        return features[is_own].view(*ids.shape, -1)


def read_documents(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, layers: Layers = (FEATURE,)
) -> Tensor:
    """Compute the features of rows of documents in one pass.

    Args:
        ids: (batch, length).
        positions: (batch, length), see [`coral_hf.training.data.documents`].
        layers: of the target's `hidden_states`.

    Returns:
        (batch, length, layers · hidden).
    """
    masks = _branch_masks(model, positions) if has_branches(positions) else None
    return read_features(model, ids, masks, positions, layers)


def _branch_masks(model: PreTrainedModel, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """Make the additive mask of rows with branches, by layer type where layers differ.

    Args:
        positions: (batch, length).

    Returns:
        (batch, 1, length, length) each.
    """
    windows, places, masks = (
        sliding_windows(model),
        Places.of(positions),
        dict[int | None, Tensor](),
    )
    for window in {*windows}:
        hidden = ~places.mask(window)[:, None]
        zeros = torch.zeros_like(hidden, dtype=model.dtype)
        masks[window] = zeros.masked_fill_(hidden, torch.finfo(model.dtype).min)
    if len(masks) == 1:
        return next(iter(masks.values()))
    kinds = zip(text_config(model).layer_types, windows, strict=False)
    return {kind: masks[window] for kind, window in kinds}


def reads_packed_rows(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a target keeps the documents of a packed row apart, found by trying.

    Most models of transformers do; some take no positions, others attend across documents. Chunks
    of attention begin at multiples of their size in a row, wherever a document begins.
    """
    return _reads_second_part(model, device, shared=0)


def reads_branches(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a target reads a branch of a document as the document, found by trying.

    Not those whose kernels or layers take no mask: flash attention, convolutions, recurrent ones.
    """
    is_plain = {*sliding_windows(model)}.isdisjoint((0, CONVOLUTION))
    implementation = text_config(model)._attn_implementation
    return is_plain and implementation in ("eager", "sdpa") and _reads_second_part(model, device, 4)


def _reads_second_part(model: PreTrainedModel, device: torch.device, shared: int) -> bool:
    """Whether a target reads the second part of a row as a document, with so many shared tokens."""
    has_chunks = "chunked_attention" in (getattr(text_config(model), "layer_types", None) or ())
    if has_chunks or not takes_positions(decoder_of(model)):
        return False
    lengths = (5, 8)
    # (2, length): some kinds of attention tell documents apart in a single row only
    ids = torch.arange(2 * sum(lengths), device=device).view(2, -1) % text_config(model).vocab_size
    mask = torch.ones_like(ids)
    first, second = (torch.arange(length, device=device) for length in lengths)
    positions = torch.cat([first, second + shared]).expand_as(ids)
    document = torch.cat([ids[:, :shared], ids[:, lengths[0] :]], 1)
    alone = read_features(model, document, mask[:, : document.shape[1]])[:, shared:]
    packed = read_documents(model, ids, positions)[:, lengths[0] :]
    as_one = read_features(model, ids, mask)[:, lengths[0] :]
    # a difference far below what attending to the first document makes is rounding
    return bool((packed - alone).abs().mean() < 0.1 * (as_one - alone).abs().mean())
