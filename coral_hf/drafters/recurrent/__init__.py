"""The Recurrent Drafter: configuration → modeling → drafting; registered on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ...decoding.drafting import register_drafting
from .configuration import RecurrentConfig
from .drafting import RecurrentDrafting
from .modeling import RecurrentDrafter

AutoConfig.register(RecurrentConfig.model_type, RecurrentConfig, exist_ok=True)
AutoModel.register(RecurrentConfig, RecurrentDrafter, exist_ok=True)
# the class by which transformers' users load assistants
AutoModelForCausalLM.register(RecurrentConfig, RecurrentDrafter, exist_ok=True)
register_drafting(RecurrentConfig.model_type, RecurrentDrafting, options=("draft_tree",))
