"""The parallel drafter (P-EAGLE): configuration → modeling → drafting; registered on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ...decoding.drafting import register_drafting
from .configuration import ParallelConfig
from .drafting import ParallelDrafting
from .modeling import ParallelDrafter

AutoConfig.register(ParallelConfig.model_type, ParallelConfig, exist_ok=True)
AutoModel.register(ParallelConfig, ParallelDrafter, exist_ok=True)
# the class by which transformers' users load assistants
AutoModelForCausalLM.register(ParallelConfig, ParallelDrafter, exist_ok=True)
register_drafting(ParallelConfig.model_type, ParallelDrafting, options=("draft_window",))
