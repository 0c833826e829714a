"""A repository on the Hub: whether a drafter may go there, and what to do when the Hub refuses.

In: a repo id, an error of huggingface_hub. Out: nothing, or an error with a sentence that helps.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelInfo, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

# what `HfApi.model_info` is asked for
ASKED = ["config", "private", "siblings"]
OUR_TYPE = "coral"
ADAPTER_CONFIG = "adapter_config.json"
# kinds of files that hold somebody's weights
WEIGHTS = {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack"}


def check_vacant(repo_id: str, token: str | bool | None = None, private: bool | None = None):
    """Raise a ValueError if publishing a drafter would spoil what is at `repo_id`.

    Args:
        token: as in `HfApi`.
        private: whether the repository shall be private; the Hub only asks when it makes one.

    Raises:
        ValueError: if another model is there, or a public repository where a private one is meant.
    """
    try:
        found = HfApi().model_info(repo_id, expand=ASKED, token=token)
    except RepositoryNotFoundError:
        return  # or one that cannot be seen: writing to it will be refused
    other = _other_model(found, token)
    if other is not None:
        raise ValueError(
            f"{repo_id} holds {other}, whose files a drafter's would replace; publish under another"
            " name."
        )
    if private and found.private is False:
        raise ValueError(
            f"{repo_id} is there already and public, and `private` only makes new repositories"
            " private; change its visibility in its settings on the Hub, or use another name."
        )


def full_name(repo_id: str, token: str | bool | None = None, private: bool | None = None) -> str:
    """A repository's whole name; one of the user's own is completed by the Hub, which makes it."""
    if "/" in repo_id:
        return repo_id
    return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def _other_model(found: ModelInfo, token: str | bool | None) -> str | None:
    """What a repository holds that is no drafter, nor an adapter of one; None if nothing."""
    model_type = (found.config or {}).get("model_type")
    names = [sibling.rfilename for sibling in found.siblings or []]
    if model_type == OUR_TYPE or ADAPTER_CONFIG in names and _adapts_drafter(found.id, token):
        return None
    if model_type is not None:
        return f"a {model_type} model"
    weights = [name for name in names if PurePosixPath(name).suffix in WEIGHTS]
    return f"another model's {weights[0]}" if weights else None


def _adapts_drafter(repo_id: str, token: str | bool | None) -> bool:
    """Whether a repository's adapter is of a drafter, as PEFT writes down."""
    adapted = (
        json.loads(text_on_hub(repo_id, ADAPTER_CONFIG, None, token)).get("auto_mapping") or {}
    )
    return str(adapted.get("parent_library")).startswith("coral_hf")


def text_on_hub(repo_id: str, name: str, revision: str | None, token: str | bool | None) -> str:
    """A small file as it is there now, whatever the cache holds of it."""
    with TemporaryDirectory() as fresh:
        path = hf_hub_download(repo_id, name, revision=revision, token=token, cache_dir=fresh)
        return Path(path).read_text(encoding="utf-8")


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Add a sentence that helps to what goes wrong between here and the Hub.

    Raises:
        HfHubHTTPError: as the Hub's client raised it, with the sentence.
        ConnectionError: where the connection broke, or what answered is no Hub.
    """
    try:
        yield
    except (HTTPError, JSONDecodeError, RuntimeError) as error:
        cause = _cause(error)
        if isinstance(cause, HfHubHTTPError):
            cause.append_to_message(f"\n{advice(repo_id, cause)}")
        elif isinstance(cause, HTTPError | JSONDecodeError):
            raise ConnectionError(
                f"The connection to the Hub broke while {repo_id} was published"
                f" ({type(cause).__name__}: {cause}). Check the network and HF_ENDPOINT, then"
                " publish again: large files that have arrived are not sent twice."
            ) from error
        if cause is error:
            raise
        raise cause from error


def _cause(error: BaseException) -> BaseException:
    """What went wrong: of a large file the client says only which one it is."""
    return error.__cause__ if type(error) is RuntimeError and error.__cause__ else error


def advice(repo_id: str, error: BaseException) -> str:
    """What to do about an error of the Hub's, in a sentence."""
    error = _cause(error)
    if not isinstance(error, HfHubHTTPError):
        return "Nothing is lost here: publish again."
    status = error.response.status_code
    if status >= 500:
        return (
            f"The Hub failed, and nothing is wrong with {repo_id}: publish again in a few minutes;"
            " large files that have arrived are not sent twice."
        )
    return {
        401: f"The Hub does not know who you are, or {repo_id} is not there: log in with `hf auth"
        " login`, or set HF_TOKEN to a token that may write.",
        403: f"You may not write to {repo_id}: use a token with write access (`hf auth whoami` says"
        " whose it is), or a name of your own or of an organisation that you belong to.",
        404: f"There is no {repo_id} on the Hub, or no such branch: check the spelling, and that"
        " you are logged in if it is private.",
        409: f"Something else has the name {repo_id}, or changed it at the same time: publish"
        " again, or under another name.",
        429: "The Hub has had too many requests from you: publish again after the time that it"
        " names, or in five minutes.",
    }.get(status, f"Publishing to {repo_id} was refused; the lines above say why.")
