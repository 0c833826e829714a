"""Files of a checkpoint: where it is read from, its tensors, and what an output folder may replace.

In: a folder or Hub id. Out: a local folder with config.json and the weights in one format, and all
of its tensors; or an error that names the file.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..drafters.model import Drafter

# in the order in which they are looked for; each may be split into shards that an index lists
WEIGHTS = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)
INDEX = ".index.json"
DOWNLOAD = {"revision", "cache_dir", "token", "local_files_only"}  # as in `from_pretrained`
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


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
        ValueError: that names the file, if one is missing or damaged, holds anything but plain
            tensors, or if shards and their index disagree.
    """
    # a folder of the Hub's cache is named after the commit that the config came from
    at_commit = {**download, "revision": folder.name}
    for name in names:
        stem, suffix = name.split(".")
        _local(source, [f"{stem}*.{suffix}", name + INDEX], **at_commit)
        if (folder / (name + INDEX)).is_file():
            return _read_shards(folder / (name + INDEX))
        if (folder / name).is_file():
            return _read_tensors(folder / name)
    raise ValueError(
        f"{folder} has none of {', '.join(names)} and no index of shards; download it again."
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read tensors of any shapes from the shards that an index lists, each where it is listed."""
    places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        shard = _read_tensors(index.parent / file)
        listed = {name for name, place in places.items() if place == file}
        if shard.keys() != listed:
            raise ValueError(
                f"{index.parent / file} and {index.name} disagree on where"
                f" {', '.join(sorted(shard.keys() ^ listed))} is; download the checkpoint again."
            )
        tensors |= shard
    return tensors


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


def read_beginning(
    source: str | Path, beginnings: tuple[str, ...], **download: Any
) -> dict[str, Tensor]:
    """Read the tensors of a model in safetensors, of any shapes, whose names begin so.

    Of a Hub id no other shards are downloaded.
    """
    index = _local(source, [SAFE_WEIGHTS_NAME + INDEX], **download) / (SAFE_WEIGHTS_NAME + INDEX)
    files = [SAFE_WEIGHTS_NAME]
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({file for name, file in places.items() if name.startswith(beginnings)})
    found: dict[str, Tensor] = {}
    for path in [_local(source, files, **download) / file for file in files]:
        if path.is_file():
            with safe_open(path, "pt") as opened:
                names = [name for name in opened.keys() if name.startswith(beginnings)]
                found |= {name: opened.get_tensor(name) for name in names}
    return found


def check_dense(tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise a ValueError for a tensor of any shape that a cast would spoil: quantised, sparse."""
    for name, tensor in tensors.items():
        is_dense = tensor.layout == torch.strided and not tensor.is_meta
        if not is_dense or tensor.dtype not in DTYPES.values():
            kind = "meta" if tensor.is_meta else tensor.layout
            raise ValueError(
                f"`{name}` in {folder} is a {kind} tensor of {tensor.dtype}; expected a dense one"
                f" of {', '.join(DTYPES)}. Take the checkpoint from before it was quantised."
            )


def read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a dtype by its name or itself; a ValueError if weights of any shape cannot have it."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"`dtype` is {dtype}; use one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def check_output(
    output: str | Path,
    overwrite: bool,
    files: tuple[str, ...],
    sources: Iterable[str | Path | None],
) -> None:
    """Raise a ValueError unless a folder is new or empty, or may be overwritten.

    Args:
        output: where a checkpoint is written to.
        overwrite: replace an earlier checkpoint, one with a config.json.
        files: patterns of all names that such a checkpoint may hold.
        sources: folders that are read, none of which may be it.
    """
    folder = Path(output)
    if not folder.exists():
        return
    if any(path and Path(path).is_dir() and folder.samefile(path) for path in sources):
        raise ValueError(f"`output` {folder} is the folder of what is read; give another one.")
    found = sorted(folder.iterdir())
    foreign = [path for path in found if not path.is_file() or not any(map(path.match, files))]
    if found and (not overwrite or foreign or not (folder / CONFIG_NAME).is_file()):
        names = ", ".join(path.name for path in (foreign or found)[:5])
        remedy = "another folder" if overwrite else "a new folder, or `overwrite`"
        raise ValueError(
            f"`output` {folder} holds {names}; give {remedy}. `overwrite` replaces an earlier"
            f" checkpoint of the same kind only, with its {CONFIG_NAME}."
        )
