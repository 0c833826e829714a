"""Checkpoints in other formats: those of drafters come in, those of other engines go out."""

from .eagle import check_tensors
from .export import export_drafter
from .files import check_output, config_folder, read_config
from .importing import import_drafter, read_shape
