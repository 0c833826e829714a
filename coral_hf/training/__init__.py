"""Training: data → features → a step's unroll and losses → trainer; settings.

Names are imported when they are first used: settings of commands lie below this folder, and
`coral-hf --help` imports no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arguments import CoralTrainingArguments, parse_arguments
    from .trainer import CoralTrainer

__all__ = ["CoralTrainer", "CoralTrainingArguments", "parse_arguments"]


def __getattr__(name: str):
    """Import a public name."""
    if name in __all__:
        module = "trainer" if name == "CoralTrainer" else "arguments"
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
