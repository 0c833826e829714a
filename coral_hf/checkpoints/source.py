"""A folder or Hub id → its config and all of its tensors, in one file or in shards.

In: folders as anybody may have made them. Out: tensors, or an error that names the file. Pickles
are read as tensors alone: nothing in them is run.
"""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

CONFIG = "config.json"
# in the order in which they are looked for; each may be cut into shards that an index lists
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
PATTERNS = ["model*.safetensors", "pytorch_model*.bin", *(name + INDEX for name in WEIGHTS)]


def source_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or that of a Hub id, downloaded."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(source).startswith("."):
        raise ValueError(f"There is no folder {source} to read a drafter from; give another one.")
    patterns = [CONFIG, *PATTERNS]
    return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a drafter, as it is written."""
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {CONFIG}; start from a folder of a drafter, or of an EAGLE checkpoint"
            " with its config. An adapter is merged first: model.merge_and_unload()."
        )
    return _read_object(file)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder.

    Raises:
        ValueError: that names the file, if one is missing, broken, or holds more than tensors, or
            if shards and their index disagree.
    """
    for name in WEIGHTS:
        if (folder / (name + INDEX)).is_file():
            return _read_shards(folder, name + INDEX)
        if (folder / name).is_file():
            return read_file(folder / name)
    shards = sorted(path.name for pattern in PATTERNS[:2] for path in folder.glob(pattern))
    found = f"only shards without an index: {', '.join(shards)}" if shards else "none of them"
    raise ValueError(
        f"{folder} has neither of {WEIGHTS} nor an index of shards ({WEIGHTS[0] + INDEX}), but"
        f" {found}. Download the checkpoint again."
    )


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; see [`read_weights`]."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and reading it could run code; have its author save"
            " it as model.safetensors."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Download it again.") from error
    strange = _not_a_tensor(tensors)
    if strange is not None:
        raise ValueError(
            f"{path} is no state dict: it holds {strange}, where names and tensors were expected."
            " Save drafter.state_dict() alone."
        )
    return tensors


def _not_a_tensor(tensors: Any) -> str | None:
    """What in a pickle is no named tensor, if anything."""
    if not isinstance(tensors, dict):
        return f"a {type(tensors).__name__}"
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            return f"a {type(tensor).__name__} under {name!r}"
    return None


def _read_shards(folder: Path, index: str) -> dict[str, Tensor]:
    """The tensors of the shards that an index lists."""
    places = _read_object(folder / index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{folder / index} has no `weight_map` of tensors; download it again.")
    _refuse_unlisted(folder, index, places)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values()), key=str):
        # an index from elsewhere may name any path
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{folder / index} names {file!r}, which is no file of its folder.")
        if not (folder / file).is_file():
            raise ValueError(f"{folder} lacks the shard {file}, which {index} lists; download it.")
        tensors |= _read_shard(folder / file, index, places)
    return tensors


def _refuse_unlisted(folder: Path, index: str, places: dict[str, str]) -> None:
    """Raise a ValueError for shards that lie beside an index and are not in it."""
    stem, suffix = index.removesuffix(INDEX).split(".")
    found = {path.name for path in folder.glob(f"{stem}-*-of-*.{suffix}")}
    unlisted = sorted(found - set(places.values()))
    if unlisted:
        raise ValueError(
            f"{folder} holds {', '.join(unlisted)}, which {index} does not list: they are of"
            " another checkpoint. Download the checkpoint into an empty folder."
        )


def _read_shard(path: Path, index: str, places: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of a shard, which are those that the index places there."""
    found = read_file(path)
    listed = {name for name, file in places.items() if file == path.name}
    for name in sorted(found.keys() ^ listed):
        if name in listed:
            reason = "has no tensor {}, which {} places there"
        elif name in places:
            reason = f"has a second {{}}: {{}} places that tensor in {places[name]}"
        else:
            reason = "has a tensor {}, which {} does not list"
        raise ValueError(f"{path} {reason.format(name, index)}. Download the checkpoint again.")
    return found


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object of fields.")
    return content
