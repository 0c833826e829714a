"""Checkpoints of EAGLE-1 and EAGLE-2 (Li et al. 2024), whose drafter ours has the shape of.

In: a folder or Hub id. Out: its tensors under our names, which are theirs, and the shape of the
drafter. Pickles are read as tensors alone.
"""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from ..configuration_coral import CoralConfig

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
EMBEDDINGS = "embed_tokens.weight"
# what the target's config cannot know, read from the checkpoint's own
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
)


class EagleCheckpoint(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]  # of the drafter
    embeddings: Tensor | None  # (vocab, hidden), a copy of the target's
    shape: dict  # fields of `CoralConfig`


def source_folder(source: str | Path) -> Path:
    """The folder itself, or that of a Hub id, downloaded."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(source).startswith("."):
        raise ValueError(f"There is no folder {source} to start a drafter from; give another one.")
    return Path(snapshot_download(str(source), allow_patterns=[CONFIG, *WEIGHTS]))


def is_drafter(folder: Path) -> bool:
    """Whether a folder holds a CORAL drafter."""
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {CONFIG}; start from a folder of a drafter, or of an EAGLE checkpoint"
            " with its config. An adapter is merged first: model.merge_and_unload()."
        )
    return json.loads(file.read_text()).get("model_type") == CoralConfig.model_type


def read_eagle(folder: Path) -> EagleCheckpoint:
    """Read a checkpoint, without a look at whether it fits."""
    tensors = _read_weights(folder)
    embeddings = tensors.pop(EMBEDDINGS, None)
    config = CoralConfig.from_target(AutoConfig.from_pretrained(folder))
    shape = {name: getattr(config, name) for name in SIZES}
    shape["fc_bias"] = "fc.bias" in tensors
    shape["attention_bias"] = "layers.0.self_attn.q_proj.bias" in tensors
    return EagleCheckpoint(tensors, embeddings, shape)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in WEIGHTS:
        path = folder / name
        if path.is_file() and path.suffix == ".safetensors":
            return load_file(path)
        if path.is_file():
            return _read_pickle(path)
    raise ValueError(f"{folder} has neither of {WEIGHTS}; a checkpoint is read from one file.")


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and reading it could run code; have its author save"
            " it as model.safetensors."
        ) from error


def check_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Raise a ValueError that names each tensor that is missing, unknown or of another shape."""
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name].shape != wanted[name].shape
        ],
    }
    listed = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if listed:
        raise ValueError(
            f"{what} does not fit the drafter, which has EAGLE-1's shape; {'; '.join(listed)}."
            " Start from another source, or from random weights."
        )
