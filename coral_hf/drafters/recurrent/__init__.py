"""The Recurrent Drafter: configuration → modeling → drafting; registered on import."""

from ..model import register_family
from .configuration import RecurrentConfig
from .drafting import RecurrentDrafting
from .modeling import RecurrentDrafter

register_family(RecurrentConfig, RecurrentDrafter, RecurrentDrafting, options=("draft_tree",))
