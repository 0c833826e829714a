"""Checkpoints in other formats: EAGLE's and HASS's come in, those of other engines go out."""

from .eagle import check_tensors, read_eagle, read_shape
from .export import check_drafter, export_drafter, export_files
from .files import OutputFolder, config_folder, read_config, source_folder
from .hot_tokens import check_size, most_frequent, proposal_counts
from .importing import DRAFTER_FILES, from_eagle

__all__ = [
    "DRAFTER_FILES",
    "OutputFolder",
    "check_drafter",
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
]
