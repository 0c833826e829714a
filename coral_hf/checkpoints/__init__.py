"""Checkpoints of others come in, drafters go out to other engines."""

from .dtypes import DTYPES
from .eagle import EagleCheckpoint, check_tensors, read_eagle
from .engines import ENGINES
from .export import Exported, check_drafter, export_drafter, export_files
from .fields import read_shape
from .folder import check_output, whole_folder
from .hot_tokens import check_size, most_frequent, proposal_counts
from .importing import DRAFTER_FILES, from_eagle
from .source import Download, config_folder, read_config, source_folder

__all__ = [
    "DRAFTER_FILES",
    "DTYPES",
    "ENGINES",
    "Download",
    "EagleCheckpoint",
    "Exported",
    "check_drafter",
    "check_output",
    "check_size",
    "check_tensors",
    "config_folder",
    "export_drafter",
    "export_files",
    "from_eagle",
    "most_frequent",
    "proposal_counts",
    "read_config",
    "read_eagle",
    "read_shape",
    "source_folder",
    "whole_folder",
]
