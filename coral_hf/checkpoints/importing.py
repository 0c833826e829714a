"""Drafters of EAGLE-1, EAGLE-2 and HASS become CORAL drafters.

In: a target and a folder or Hub id. Out: a drafter that predicts what the checkpoint predicts. Each
tensor has its place, is compared with the target's own and dropped, or is an error.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_coral import CoralDrafter
from ..target import read_target, text_config, tokenizer_hash
from .copies import check_copies, scale_embeddings, table_scale
from .eagle import EagleCheckpoint, check_tensors, read_eagle
from .source import source_folder


def from_eagle(
    target: PreTrainedModel,
    source: str | Path,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    drafter_class: type[CoralDrafter] = CoralDrafter,
) -> CoralDrafter:
    """A drafter for `target` from an EAGLE-1, EAGLE-2 or HASS checkpoint, or from an export.

    Args:
        target: that the checkpoint was made for.
        source: a folder or Hub id, with config.json and the weights in safetensors or a pickle,
            in one file or in shards.
        revision: of a Hub id.
        dtype: of the drafter; the target's by default.
        tokenizer: the target's, whose hash the drafter then remembers.

    Raises:
        ValueError: if the checkpoint is broken, of another kind, or made for another target,
            naming the tensor, field or file.
    """
    checkpoint = read_eagle(source_folder(source, revision))
    shape = _shape_for(target, checkpoint, source)
    drafter = drafter_class.from_target(target, **shape).to(dtype or target.dtype)
    check_tensors(checkpoint.tensors, drafter.state_dict(), f"The EAGLE checkpoint {source}")
    bound = read_target(target, drafter.config)
    check_copies(checkpoint, bound, drafter)
    own_scale = table_scale(bound)
    drafter.load_state_dict(scale_embeddings(checkpoint.tensors, 1 / own_scale))
    if tokenizer is not None:
        drafter.config.tokenizer_hash = tokenizer_hash(tokenizer)
    return drafter.eval()


def _shape_for(target: PreTrainedModel, checkpoint: EagleCheckpoint, source: str | Path) -> dict:
    """The shape of a checkpoint, whose sizes are those of the target."""
    shape = dict(checkpoint.shape)
    for name in ("hidden_size", "vocab_size"):
        expected, found = getattr(text_config(target), name), shape.pop(name)
        if found != expected:
            raise ValueError(
                f"`{name}` of the target is {expected}, but the EAGLE checkpoint {source} was made"
                f" for a target with {found}. Give the checkpoint's own target."
            )
    return shape
