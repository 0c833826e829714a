"""Files of a checkpoint: where it is read from, its tensors, and an output folder.

In: a folder or Hub id. Out: a local folder with config.json and the weights in one format, and all
of its tensors; or an error that names the file.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..drafters.model import Drafter

# in the order in which they are looked for; each may be split into shards
WEIGHTS = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)
DOWNLOAD = {"revision", "cache_dir", "token", "local_files_only"}  # as in `from_pretrained`
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Checkpoint(NamedTuple):
    """What a checkpoint's config.json says."""

    folder: Path
    config: dict[str, Any]  # as it is written
    fields: dict[str, Any]  # of the drafter's config, those that do not follow from tensors
    kind: type[Drafter]


def config_folder(source: str | Path, **download: Any) -> Path:
    """Return a local folder with the config of a folder or Hub id; nothing else is downloaded."""
    return _local(source, [CONFIG_NAME], **download)


def _local(source: str | Path, patterns: list[str], **download: Any) -> Path:
    """Return the folder itself, or download the files of a Hub id whose names match."""
    if unknown := download.keys() - DOWNLOAD:
        raise TypeError(f"unexpected arguments: {', '.join(sorted(unknown))}")
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns, **download))
    except HFValidationError as error:
        raise ValueError(f"There is no folder {source}, and it is no Hub id: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read the fields of a drafter's config.json as they are written."""
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_NAME}; start from a drafter's folder or a checkpoint with its"
            " config. An adapter is merged first: model.merge_and_unload()."
        )
    return PreTrainedConfig.get_config_dict(folder)[0]


def read_weights(
    source: str | Path, folder: Path, names: tuple[str, ...], **download: Any
) -> dict[str, Tensor]:
    """Read all tensors, of any shapes, in the first format that there is, from a file or shards.

    Args:
        folder: of [`config_folder`], to which a Hub id's are added.
        names: of the files, format by format.

    Raises:
        ValueError: that names the file, if none is there, or if one is damaged or holds anything
            but plain tensors.
    """
    # a folder of the Hub's cache is named after the commit that the config came from
    at_commit = {**download, "revision": folder.name}
    for name in names:
        shards = name.replace(".", "-*-of-*.")
        _local(source, [name, shards], **at_commit)
        if files := [*folder.glob(name)] or sorted(folder.glob(shards)):
            return {name: one for file in files for name, one in _read_tensors(file).items()}
    raise ValueError(f"{folder} has none of {', '.join(names)} and no shards; download it again.")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one file, of any shapes; nothing in a pickle is run."""
    is_safe = path.suffix == ".safetensors"
    try:
        tensors = load_file(path) if is_safe else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises any
        raise ValueError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__}). Download it"
            " again (with Git: `git lfs pull`), or have its author save it as safetensors."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} is not a state dict; save drafter.state_dict() alone.")
    return tensors


def renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Give tensors of any shapes other names: patterns → what takes the place of a match."""
    for pattern, own in names.items():
        tensors = {re.sub(pattern, own, name): tensor for name, tensor in tensors.items()}
    return tensors


def check_dense(tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise a ValueError for a tensor of any shape that a cast would spoil: quantised, sparse."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
            kind = "meta" if tensor.is_meta else tensor.layout
            raise ValueError(
                f"`{name}` in {folder} is a {kind} tensor of {tensor.dtype}; expected a dense one"
                f" of {DTYPES}. Take the checkpoint from before it was quantised."
            )


def check_output(output: str | Path) -> None:
    """Raise a ValueError unless a folder is new or empty."""
    if (folder := Path(output)).exists() and (found := sorted(folder.iterdir())):
        names = ", ".join(path.name for path in found[:5])
        raise ValueError(f"`output` {folder} holds {names}; give a new folder.")
