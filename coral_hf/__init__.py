"""CORAL: speculative decoding with learned drafters, for Hugging Face transformers.

`import coral_hf` registers the drafter with the Auto classes and lets `generate` take it as
`assistant_model`.
"""

from transformers import AutoConfig, AutoModel

from .configuration_coral import CoralConfig
from .decoding import CoralCandidateGenerator, CoralGenerateOutput, decoder, install, uninstall
from .modeling_coral import CoralDrafter

__version__ = "0.1.0"

AutoConfig.register(CoralConfig.model_type, CoralConfig, exist_ok=True)
AutoModel.register(CoralConfig, CoralDrafter, exist_ok=True)
install()


def __getattr__(name: str):
    """Import the trainer's names when they are first asked for: `Trainer` takes seconds."""
    if name in ("CoralTrainer", "CoralTrainingArguments"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CoralCandidateGenerator",
    "CoralConfig",
    "CoralDrafter",
    "CoralGenerateOutput",
    "CoralTrainer",
    "CoralTrainingArguments",
    "decoder",
    "install",
    "uninstall",
]
