"""Decoding: drafting (the seam) → target runner, verifier, caches → loop → generate (the door)."""

from .caches.ragged_cache import RaggedCache
from .drafting import (
    Drafting,
    DraftTree,
    FixedDrafting,
    TreeShape,
    Warp,
    register_drafting,
    root_only,
)
from .generate import install, uninstall
from .loop import CoralGenerateOutput, DecodingStats
from .preparation.needs import register_input
from .rounds.warm_up import warm_up
from .watchers import DraftStreamer
