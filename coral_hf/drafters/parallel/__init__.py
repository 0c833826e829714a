"""The parallel drafter (P-EAGLE): configuration → modeling → drafting; registered on import."""

from ..model import register_family
from .configuration import ParallelConfig
from .drafting import ParallelDrafting
from .modeling import ParallelDrafter

register_family(ParallelConfig, ParallelDrafter, ParallelDrafting, options=("draft_window",))
