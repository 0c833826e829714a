"""Checkpoints of EAGLE-1, EAGLE-2 (Li et al. 2024) and HASS (Zhang et al. 2024).

In: a folder. Out: its tensors under our names, which are theirs, the copies of the target's, and
the shape of the drafter.

    embedding (hidden) ┐
                       ├ fc (hidden, 2 hidden) ─ layers.0 without an input norm ─ next feature
    feature   (hidden) ┘
"""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .dtypes import check_dtypes
from .fields import read_shape, refuse_eagle3
from .weights import read_weights

EMBEDDINGS, HEAD = "embed_tokens.weight", "lm_head.weight"
INVERSE_FREQUENCIES = "rotary_emb.inv_freq"
# a bias that the config promises and the file lacks is missing, and the other way round; where the
# config says nothing, these tensors do
BIASES = {"fc_bias": "fc.bias", "attention_bias": "layers.0.self_attn.q_proj.bias"}
# what an EAGLE-3 drafter has and an EAGLE-1 drafter has not
EAGLE3_TENSORS = ("d2t", "t2d", "midlayer.", "hidden_norm.", "layers.0.hidden_norm.")


class EagleCheckpoint(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]  # of the drafter
    copies: dict[str, Tensor]  # (vocab, hidden) each, of the target: embeddings, LM head
    frequencies: dict[str, Tensor]  # (head_dim / 2,) each, of the rotary embedding
    shape: dict[str, Any]  # fields of `CoralConfig`


def read_eagle(folder: Path) -> EagleCheckpoint:
    """Read a checkpoint, without a look at whether it fits a target.

    Raises:
        ValueError: if a file is broken, a field makes no sense, a tensor is of no use, or the
            drafter is EAGLE-3's.
    """
    shape = read_shape(folder)
    tensors = read_weights(folder)
    foreign = sorted(name for name in tensors if name.startswith(EAGLE3_TENSORS))
    if foreign:
        refuse_eagle3(folder, ", ".join(foreign[:3]))
    check_dtypes(tensors, folder)
    copies = {name: tensors.pop(name) for name in (EMBEDDINGS, HEAD) if name in tensors}
    rotary = [name for name in tensors if name.endswith(INVERSE_FREQUENCIES)]
    frequencies = {name: tensors.pop(name) for name in rotary}
    undecided = {field: name for field, name in BIASES.items() if shape[field] is None}
    shape |= {field: name in tensors for field, name in undecided.items()}
    return EagleCheckpoint(tensors, copies, frequencies, shape)


def check_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Raise a ValueError that names each tensor that does not fit.

    Args:
        found: tensors of a checkpoint or a layer.
        wanted: tensors of the names and shapes that there should be.
        what: the checkpoint or layer, as a message begins.
    """
    both = sorted(wanted.keys() & found.keys())
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in both
            if found[name].shape != wanted[name].shape
        ],
        "not finite": [name for name in both if not found[name].isfinite().all()],
    }
    listed = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if listed:
        raise ValueError(
            f"{what} does not fit the drafter, which has EAGLE-1's shape; {'; '.join(listed)}."
            " Start from another source, or from random weights."
        )
