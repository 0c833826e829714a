"""A folder or Hub id → a folder on this machine, and its config.

In: a name as a user gives it. Out: a folder with config.json, then with the weights of the format
that will be read; or an error of the Hub's, with a sentence that helps.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)

CONFIG = "config.json"
# in the order in which they are looked for; each may be cut into shards that an index lists
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"


@dataclass(frozen=True)
class Download:
    """How a Hub id is downloaded; the fields are huggingface_hub's."""

    revision: str | None = None  # a branch, tag or commit
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False  # take what the cache has


def source_folder(source: str | Path, download: Download | None = None) -> Path:
    """The folder itself, or that of a Hub id, downloaded: config and weights."""
    return weights_folder(source, config_folder(source, download), download)


def config_folder(source: str | Path, download: Download | None = None) -> Path:
    """The folder itself, or that of a Hub id, of which its config alone is downloaded."""
    folder, download = Path(source), download or Download()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(source).startswith("."):
        raise ValueError(f"There is no folder {source} to read a drafter from; give another one.")
    with explained(str(source), download):
        return Path(hf_hub_download(str(source), CONFIG, **vars(download))).parent


def weights_folder(source: str | Path, folder: Path, download: Download | None = None) -> Path:
    """The folder of [`config_folder`] with its weights, in the first format that there is."""
    if Path(source).is_dir():
        return folder
    # the commit that the config came from
    at_commit = replace(download or Download(), revision=folder.name)
    names = [file for name in WEIGHTS for file in (name + INDEX, name)]
    # what is in the cache is looked for first, since it needs no network
    names.sort(key=lambda name: not (folder / name).is_file())
    found = next((name for name in names if _is_fetched(str(source), name, at_commit)), "")
    if found.endswith(INDEX):
        for shard in sorted(set(read_index(folder / found).values())):
            _is_fetched(str(source), shard, at_commit)
    return folder


def _is_fetched(name: str, file: str, download: Download) -> bool:
    """Whether a repository, or the cache of it, has a file, which is then in the cache."""
    with explained(name, download):
        try:
            hf_hub_download(name, file, **vars(download))
        except LocalEntryNotFoundError:
            if download.local_files_only:
                return False
            raise
        except EntryNotFoundError:
            return False
    return True


@contextmanager
def explained(name: str, download: Download) -> Iterator[None]:
    """Add a sentence that helps to what goes wrong between here and the Hub.

    Raises:
        HfHubHTTPError, LocalEntryNotFoundError, HFValidationError: as the Hub's client raised it,
            with the sentence.
        ValueError: if there is no config.json.
        ConnectionError: where the connection broke.
    """
    try:
        yield
    except (LocalEntryNotFoundError, HFValidationError) as error:
        error.args = (f"{error}\n{_advice(name, error.__cause__ or error, download)}",)
        raise
    except EntryNotFoundError as error:
        raise ValueError(_no_config(name)) from error
    except HfHubHTTPError as error:
        error.append_to_message(f"\n{_advice(name, error, download)}")
        raise
    except HTTPError as error:
        raise ConnectionError(
            f"The connection to the Hub broke while {name} was downloaded"
            f" ({type(error).__name__}: {error}). Check the network and HF_ENDPOINT, and try again:"
            " files that have arrived are kept."
        ) from error


def _advice(name: str, error: BaseException, download: Download) -> str:
    """What to do about an error of the Hub's client, in a sentence."""
    if isinstance(error, HFValidationError):
        return f"There is no folder {name} either: check the path, or give organisation/name."
    if isinstance(error, HfHubHTTPError):
        return _advice_for_status(name, error.response.status_code)
    if download.local_files_only:
        return f"{name} is not whole in the cache: download it first, without `local_files_only`."
    return (
        f"There is no folder {name}, and the Hub did not answer: check the path, or the network,"
        " HF_ENDPOINT and HF_HUB_OFFLINE, and try again."
    )


def _advice_for_status(name: str, status: int) -> str:
    if status >= 500:
        return f"The Hub failed, and nothing is wrong with {name}: try again in a few minutes."
    return {
        401: f"There is no {name} on the Hub, or it is private and you are not logged in: check the"
        " name, and log in with `hf auth login`, or set HF_TOKEN to a token that may read it.",
        403: f"You may not read {name}: ask for access on its page on the Hub, and use a token of"
        " that account (`hf auth whoami` says whose it is).",
        404: f"There is no {name} on the Hub, or no such revision: check the name, and that you are"
        " logged in if it is private.",
        429: "The Hub has had too many requests from you: try again after the time that it names,"
        " or in five minutes; `hf auth login` raises the limit.",
    }.get(status, f"Reading {name} was refused; the lines above say why.")


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a drafter, as it is written."""
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(_no_config(folder))
    return read_object(file)


def _no_config(where: object) -> str:
    return (
        f"{where} has no {CONFIG}; start from a folder of a drafter, or of an EAGLE checkpoint"
        " with its config. An adapter is merged first: model.merge_and_unload()."
    )


def read_object(file: Path) -> dict[str, Any]:
    """The fields of a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object of fields.")
    return content


def read_index(file: Path) -> dict[str, str]:
    """tensor → shard, as an index of shards lists them."""
    places = read_object(file).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{file} has no `weight_map` of tensors; download it again.")
    for shard in places.values():
        # an index from elsewhere may name any path
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{file} names {shard!r}, which is no file of its folder.")
    return places
