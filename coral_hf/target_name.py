"""What a target is called, for the config of its drafter.

In: the name that a target was loaded by. Out: its id or path, and its commit on the Hub.
"""

import os

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils import CONFIG_NAME


def full_name(name: str) -> str | None:
    """A target's id; of a folder the whole path, which means the same from elsewhere."""
    return os.path.abspath(name) if os.path.isdir(name) else name or None


def cached_commit(name: str) -> str | None:
    """The commit of a model of the Hub, as the cache knows it; None for a folder.

    Newer versions of transformers keep no commit in a config. Where the cache holds several
    commits, which of them was loaded is not known.
    """
    if not name or os.path.isdir(name):
        return None
    try:
        path = try_to_load_from_cache(name, CONFIG_NAME)
    except HFValidationError:  # of a folder that is no longer there
        return None
    if not isinstance(path, str):
        return None
    commit = os.path.dirname(path)
    return os.path.basename(commit) if len(os.listdir(os.path.dirname(commit))) == 1 else None
