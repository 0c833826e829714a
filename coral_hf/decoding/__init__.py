"""Decoding: drafting (the seam) → target runner, verifier, caches → loop → generate (the door)."""

from .drafting import Drafting, DraftTree, TreeShape, register_drafting, root_only
from .generate import decoder, install, uninstall
from .loop import CoralGenerateOutput, DecodingStats

__all__ = [
    "CoralGenerateOutput",
    "DecodingStats",
    "DraftTree",
    "Drafting",
    "TreeShape",
    "decoder",
    "install",
    "register_drafting",
    "root_only",
    "uninstall",
]
