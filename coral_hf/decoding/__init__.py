"""Decoding: tree → candidate generator / verification / cache → loop → generate (the door)."""

from .drafting import Drafting, register_drafting
from .generate import decoder, install, uninstall
from .loop import CoralGenerateOutput
from .stats import DecodingStats
from .tree import DraftTree, TreeBuilder, TreeShape, root_only

__all__ = [
    "CoralGenerateOutput",
    "DecodingStats",
    "DraftTree",
    "Drafting",
    "TreeBuilder",
    "TreeShape",
    "decoder",
    "install",
    "register_drafting",
    "root_only",
    "uninstall",
]
