"""EAGLE-3's drafter: configuration → modeling → drafting; registered on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ...decoding.drafting import register_drafting
from .configuration import Eagle3Config, default_layers
from .drafting import Eagle3Drafting
from .modeling import Eagle3Drafter

AutoConfig.register(Eagle3Config.model_type, Eagle3Config, exist_ok=True)
AutoModel.register(Eagle3Config, Eagle3Drafter, exist_ok=True)
# the class by which transformers' users load assistants
AutoModelForCausalLM.register(Eagle3Config, Eagle3Drafter, exist_ok=True)
register_drafting(Eagle3Config.model_type, Eagle3Drafting, options=("draft_window",))
