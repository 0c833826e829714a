"""CORAL: speculative decoding with learned drafters, for Hugging Face transformers.

`import coral_hf` registers the drafters with the Auto classes and lets `generate` take them as
`assistant_model`.
"""

import importlib

from .decoding import CoralGenerateOutput, decoder, install, register_drafting, uninstall
from .drafters.bigram import BigramConfig, BigramDrafter
from .drafters.coral import CoralConfig, CoralDrafter
from .drafters.publisher import register_publisher

__version__ = "0.1.0"

# public names whose modules are imported when they are first asked for: some take seconds
_LAZY = {
    "CoralTrainer": "training",
    "CoralTrainingArguments": "training",
    "autotune": "measure.autotune",
    "from_eagle": "checkpoints",
    "publish": "hub",
}

install()
register_publisher(lambda: importlib.import_module(f"{__name__}.hub"))


def __getattr__(name: str):
    """A public name of `_LAZY`."""
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BigramConfig",
    "BigramDrafter",
    "CoralConfig",
    "CoralDrafter",
    "CoralGenerateOutput",
    "CoralTrainer",
    "CoralTrainingArguments",
    "autotune",
    "decoder",
    "from_eagle",
    "install",
    "publish",
    "register_drafting",
    "uninstall",
]
