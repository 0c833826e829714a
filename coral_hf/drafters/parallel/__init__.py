"""The parallel drafter (P-EAGLE): configuration → modeling → drafting; registered on import."""

from ..model import register_family
from .configuration import ParallelConfig
from .drafting import ParallelDrafting
from .modeling import ParallelDrafter

options = ("draft_head", "draft_window")
register_family(ParallelConfig, ParallelDrafter, ParallelDrafting, options)
