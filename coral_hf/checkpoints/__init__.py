"""Checkpoints in other formats: those of drafters come in, those of other engines go out."""

from .eagle import check_tensors
from .export import check_drafter, export_drafter, export_files
from .files import check_output, config_folder, read_config
from .importing import DRAFTER_FILES, from_eagle, import_drafter, read_shape
