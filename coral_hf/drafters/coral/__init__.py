"""CORAL's drafter: configuration → layers → modeling → drafting; registered on import."""

from ..model import register_family
from .configuration import CoralConfig
from .drafting import CoralDrafting
from .modeling import CoralDrafter

register_family(CoralConfig, CoralDrafter, CoralDrafting, options=("draft_head", "draft_window"))
