"""EAGLE-3's drafter: configuration → modeling → drafting; registered on import."""

from ..model import register_family
from .configuration import Eagle3Config, default_layers
from .drafting import Eagle3Drafting
from .modeling import Eagle3Drafter

options = ("draft_head", "draft_window")
register_family(Eagle3Config, Eagle3Drafter, Eagle3Drafting, options)
