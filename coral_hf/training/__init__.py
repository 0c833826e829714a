"""Training: data → features → a step's unroll and losses → trainer; settings.

Names are imported when they are first used: settings of commands lie below this folder, and
`coral-hf --help` imports no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arguments import AssistantTrainingArguments, CoralTrainingArguments, parse_arguments
    from .assistant import AssistantTrainer
    from .trainer import CoralTrainer

__all__ = [
    "AssistantTrainer",
    "AssistantTrainingArguments",
    "CoralTrainer",
    "CoralTrainingArguments",
    "parse_arguments",
]
_TRAINERS = {"AssistantTrainer": "assistant", "CoralTrainer": "trainer"}


def __getattr__(name: str):
    """Import a public name."""
    if name in __all__:
        module = _TRAINERS.get(name, "arguments")
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
