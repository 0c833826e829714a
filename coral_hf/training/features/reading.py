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
        self._reads: dict[bool, bool] = {}  # `reads_parts` by whether there are branches

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
        kind = has_branches(positions)
        if kind not in self._reads:
            self._reads[kind] = reads_parts(self.target, positions.device, kind)
        if not self._reads[kind]:
            return self._read_by_document(ids, positions)
        masks = _branch_masks(self.target, positions) if kind else None
        return read_features(self.target, ids, masks, positions, self.layers)

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


def _branch_masks(model: PreTrainedModel, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """Make the additive mask of rows with branches, by layer type where layers differ.

    Args:
        positions: (batch, length).

    Returns:
        (batch, 1, length, length) each.
    """
    windows, places = sliding_windows(model), Places.of(positions)
    masks = dict[int | None, Tensor]()
    for window in {*windows}:
        hidden = ~places.mask(window)[:, None]
        zeros = torch.zeros_like(hidden, dtype=model.dtype)
        masks[window] = zeros.masked_fill_(hidden, torch.finfo(model.dtype).min)
    if len(masks) == 1:
        return next(iter(masks.values()))
    kinds = zip(text_config(model).layer_types, windows, strict=False)
    return {kind: masks[window] for kind, window in kinds}


def reads_parts(model: PreTrainedModel, device: torch.device, is_branch: bool = False) -> bool:
    """Whether a target reads each part of a row, document or branch, as a row, found by trying.

    Most models of transformers keep documents apart; some take no positions, others attend across
    documents. Chunks of attention begin at multiples of their size in a row, wherever a document
    begins. Branches need a mask of their own, which flash attention, convolutions and recurrent
    layers do not take.
    """
    text = text_config(model)
    has_chunks = "chunked_attention" in (getattr(text, "layer_types", None) or ())
    if has_chunks or not takes_positions(decoder_of(model)):
        return False
    takes_mask = text._attn_implementation in ("eager", "sdpa")
    if is_branch and not (takes_mask and {*sliding_windows(model)}.isdisjoint((0, CONVOLUTION))):
        return False
    lengths, shared = (5, 8), 4 if is_branch else 0  # tokens of the first part that both have
    # (2, length): some kinds of attention tell documents apart in a single row only
    ids = torch.arange(2 * sum(lengths), device=device).view(2, -1) % text.vocab_size
    mask = torch.ones_like(ids)
    first, second = (torch.arange(length, device=device) for length in lengths)
    positions = torch.cat([first, second + shared]).expand_as(ids)
    document = torch.cat([ids[:, :shared], ids[:, lengths[0] :]], 1)
    alone = read_features(model, document, mask[:, : document.shape[1]])[:, shared:]
    masks = _branch_masks(model, positions) if is_branch else None
    packed = read_features(model, ids, masks, positions)[:, lengths[0] :]
    as_one = read_features(model, ids, mask)[:, lengths[0] :]
    # a difference far below what attending to the first document makes is rounding
    return bool((packed - alone).abs().mean() < 0.1 * (as_one - alone).abs().mean())
