"""EAGLE-3's drafter and the parallel one (P-EAGLE): configuration → modeling → drafting."""

from ..model import register_family
from .configuration import Eagle3Config, ParallelConfig, default_layers
from .drafting import Eagle3Drafting, ParallelDrafting
from .modeling import Eagle3Drafter, ParallelDrafter

register_family(Eagle3Drafter, Eagle3Drafting)
register_family(ParallelDrafter, ParallelDrafting)
