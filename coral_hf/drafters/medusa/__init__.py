"""Medusa heads as a drafter: configuration → modeling → drafting; registered on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ...decoding.drafting import register_drafting
from .configuration import MedusaConfig
from .drafting import MedusaDrafting
from .modeling import MedusaDrafter

AutoConfig.register(MedusaConfig.model_type, MedusaConfig, exist_ok=True)
AutoModel.register(MedusaConfig, MedusaDrafter, exist_ok=True)
# the class by which transformers' users load assistants
AutoModelForCausalLM.register(MedusaConfig, MedusaDrafter, exist_ok=True)
register_drafting(MedusaConfig.model_type, MedusaDrafting)
