"""All tensors of a folder, in one file or in shards.

In: folders as anybody may have made them. Out: tensors, or an error that names the file. Pickles
are read as tensors alone: nothing in them is run.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .source import INDEX, WEIGHTS, read_index

# how files begin: those of torch.save since 1.6, those before, and what git keeps of a large file
ZIP, PICKLE, POINTER = b"PK\x03\x04", b"\x80", b"version https://git-lfs"


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
    patterns = ("model*.safetensors", "pytorch_model*.bin")
    shards = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    found = f"only shards without an index: {', '.join(shards)}" if shards else "none of them"
    raise ValueError(
        f"{folder} has neither of {WEIGHTS} nor an index of shards ({WEIGHTS[0] + INDEX}), but"
        f" {found}. Download the checkpoint again."
    )


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; see [`read_weights`]."""
    _check_beginning(path)
    if path.suffix != ".safetensors":
        return _read_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Download it again.") from error


def _check_beginning(path: Path) -> None:
    """Raise a ValueError for a file that is plainly something else."""
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise ValueError(
            f"{path} is a Git LFS pointer: it stands for a file that was not downloaded. Run"
            " `git lfs pull` in its folder, or download it again."
        )
    if path.suffix != ".safetensors" and not start.startswith((ZIP, PICKLE)):
        found = f"begins with {start[:12]!r}" if start else "is empty"
        raise ValueError(f"{path} is no PyTorch file: it {found}; download it again.")


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and reading it could run code; have its author save"
            " it as model.safetensors."
        ) from error
    except Exception as error:  # a pickle that is cut off or damaged raises any
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read: {reason}. Download it again.") from error
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
    places = read_index(folder / index)
    _refuse_unlisted(folder, index, places)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
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
