"""Medusa heads as a drafter: configuration → modeling → drafting; registered on import."""

from ..model import register_family
from .configuration import MedusaConfig
from .drafting import MedusaDrafting
from .modeling import MedusaDrafter

register_family(MedusaConfig, MedusaDrafter, MedusaDrafting)
