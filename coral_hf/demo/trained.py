"""The demo's models, from the cache or trained anew.

In: settings. Out: folders that `from_pretrained` loads, each cached by all that it depends on.
"""

import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cache import Cache, Cached
from .corpus import read_corpus
from .drafter import train_drafter
from .settings import DemoSettings
from .target import train_target

Announce = Callable[[str], None]


def own_target(settings: DemoSettings, device: torch.device, announce: Announce) -> Cached:
    """The demo's own target; `announce` is told before it is trained."""

    def fill(folder: Path) -> None:
        announce("Training a small target on the standard library's source")
        train_target(read_corpus(settings.own_target.num_files).documents, settings, device, folder)

    cache = Cache.at(settings.cache_dir, settings.fresh)
    return cache.get("stdlib-target", common_key(settings), fill)


def own_drafter(
    source: str,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: DemoSettings,
    announce: Announce,
) -> Cached:
    """The drafter for the target that was loaded from `source`; `announce` as above."""

    def fill(folder: Path) -> None:
        announce("Training the drafter, then its router")
        train_drafter(target, tokenizer, settings, folder)

    key = {
        **common_key(settings),
        "source": identity(source),
        "budgets": [asdict(settings.drafter_budget), asdict(settings.router_budget)],
        "drafter_batch_size": settings.drafter_batch_size,
    }
    if settings.dataset is not None:
        # as many rows are held out as there are prompts
        key |= {"dataset": identity(settings.dataset), "num_prompts": settings.num_prompts}
    return Cache.at(settings.cache_dir, settings.fresh).get("drafter", key, fill)


def common_key(settings: DemoSettings) -> dict[str, Any]:
    """What every training depends on."""
    return {
        "python": platform.python_version(),  # whose source is read
        "own_target": asdict(settings.own_target),
        "rows": [settings.batch_size, settings.row_length],
        "seed": settings.seed,
    }


def identity(source: str) -> tuple[str, int]:
    """A path and when it was last written to; a hub id as it is."""
    path = Path(source)
    if not path.exists():
        return source, 0
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return str(path.resolve()), max(file.stat().st_mtime_ns for file in files)
