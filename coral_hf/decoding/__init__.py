"""Decoding: tree → candidate generator / verification / cache → loop → generate (the door)."""

from .drafting import Drafting, register_drafting
from .generate import decoder, install, uninstall
from .loop import CoralGenerateOutput
from .stats import DecodingStats
from .tree import DraftTree, TreeShape

__all__ = [
    "CoralGenerateOutput",
    "DecodingStats",
    "DraftTree",
    "Drafting",
    "TreeShape",
    "decoder",
    "install",
    "register_drafting",
    "uninstall",
]
