"""Checkpoints of others come in, drafters go out to other engines."""

from .eagle import EagleCheckpoint, check_tensors, read_eagle
from .export import Exported, export_drafter
from .folder import whole_folder
from .hot_tokens import most_frequent, proposal_counts
from .importing import from_eagle
from .source import read_config, source_folder

__all__ = [
    "EagleCheckpoint",
    "Exported",
    "check_tensors",
    "export_drafter",
    "from_eagle",
    "most_frequent",
    "proposal_counts",
    "read_config",
    "read_eagle",
    "source_folder",
    "whole_folder",
]
