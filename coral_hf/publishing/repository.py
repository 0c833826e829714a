"""A repository on the Hub: whether a drafter may go there, and what to do when the Hub refuses.

In: a repo id, an error of huggingface_hub. Out: nothing, or an error with a sentence that helps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

# what `HfApi.model_info` is asked for
ASKED = ["config", "private"]


def check_vacant(repo_id: str, token: str | bool | None = None, private: bool | None = None):
    """Raise a ValueError if publishing a drafter would spoil what is at `repo_id`.

    Args:
        token: as in `HfApi`.
        private: whether the repository shall be private; the Hub only asks when it makes one.

    Raises:
        ValueError: if another model is there, or a public repository where a private one is meant.
    """
    if "/" not in repo_id:
        return  # a name of the user's own, which only the Hub can complete
    try:
        found = HfApi().model_info(repo_id, expand=ASKED, token=token)
    except RepositoryNotFoundError:
        return  # or one that cannot be seen: writing to it will be refused
    model_type = (found.config or {}).get("model_type", "coral")
    if model_type != "coral":
        raise ValueError(
            f"{repo_id} holds a {model_type} model, whose files a drafter's would replace; publish"
            " under another name."
        )
    if private and found.private is False:
        raise ValueError(
            f"{repo_id} is there already and public, and `private` only makes new repositories"
            " private; change its visibility in its settings on the Hub, or use another name."
        )


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Add a sentence that helps to what goes wrong between here and the Hub.

    Raises:
        HfHubHTTPError: as the Hub's client raised it, with the sentence.
        ConnectionError: where the connection broke, or what answered is no Hub.
    """
    try:
        yield
    except HfHubHTTPError as error:
        error.append_to_message(f"\n{advice(repo_id, error)}")
        raise
    except (HTTPError, JSONDecodeError) as error:
        raise ConnectionError(
            f"The connection to the Hub broke while {repo_id} was published"
            f" ({type(error).__name__}: {error}). Check the network and HF_ENDPOINT, then publish"
            " again: large files that have arrived are not sent twice."
        ) from error


def cached_commit(repo_id: str) -> str | None:
    """The commit of a model that was just loaded from the Hub; None for a folder."""
    path = None if Path(repo_id).exists() else try_to_load_from_cache(repo_id, "config.json")
    return Path(path).parent.name if isinstance(path, str) else None


def advice(repo_id: str, error: Exception) -> str:
    """What to do about an error of the Hub's, in a sentence."""
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
