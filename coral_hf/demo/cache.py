"""Folders that are dear to make and kept for the next time.

In: a name, what the content depends on, and a function that fills a folder. Out: the filled folder.
It is filled under another name and renamed when complete, so an interrupted run leaves no half one.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.constants import HF_HOME


class Cached(NamedTuple):
    """A folder of the cache."""

    folder: Path
    is_new: bool  # made by this call


class Cache(NamedTuple):
    """Where such folders are, and whether those that exist are used."""

    root: Path
    is_fresh: bool = False  # make everything again

    @classmethod
    def at(cls, root: Path | None, is_fresh: bool) -> "Cache":
        """The cache in a folder; in the user's Hugging Face cache if None."""
        return cls(Path(HF_HOME) / "coral_hf" if root is None else Path(root), is_fresh)

    def get(self, name: str, key: dict[str, Any], fill: Callable[[Path], None]) -> Cached:
        """The folder `name` of a key, filled by `fill` unless it is there.

        Args:
            key: what the content depends on; written as JSON, so all of it must have a `str`.
        """
        folder = self.root / f"{name}-{digest(key)}"
        if folder.is_dir() and not self.is_fresh:
            return Cached(folder, is_new=False)
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root, prefix=".unfinished-") as temporary:
            complete = Path(temporary) / name
            complete.mkdir()
            fill(complete)
            shutil.rmtree(folder, ignore_errors=True)
            complete.rename(folder)
        return Cached(folder, is_new=True)


def digest(key: dict[str, Any]) -> str:
    """Twelve hexadecimal digits of a key."""
    text = json.dumps(key, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
