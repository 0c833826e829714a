"""Decoding: tree → candidate generator / verification / cache → loop → generate (the door)."""

from .candidate_generator import CoralCandidateGenerator
from .generate import decoder, install, uninstall
from .loop import CoralGenerateOutput
from .stats import DecodingStats
from .tree import DraftTree, TreeShape

__all__ = [
    "CoralCandidateGenerator",
    "CoralGenerateOutput",
    "DecodingStats",
    "DraftTree",
    "TreeShape",
    "decoder",
    "install",
    "uninstall",
]
