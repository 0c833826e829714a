"""CORAL's drafter: configuration → layers → modeling → drafting; registered on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ...decoding.drafting import register_drafting
from .configuration import CoralConfig
from .drafting import CoralDrafting
from .modeling import CoralDrafter

AutoConfig.register(CoralConfig.model_type, CoralConfig, exist_ok=True)
AutoModel.register(CoralConfig, CoralDrafter, exist_ok=True)
# the class by which transformers' users load assistants
AutoModelForCausalLM.register(CoralConfig, CoralDrafter, exist_ok=True)
register_drafting(CoralConfig.model_type, CoralDrafting, options=("draft_head", "draft_window"))
