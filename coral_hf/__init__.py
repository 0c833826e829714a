"""CORAL: speculative decoding with learned drafters, for Hugging Face transformers.

`import coral_hf` registers the drafters with the Auto classes and lets `generate` take them as
`assistant_model`. In the program `coral-hf` that waits until a command runs: torch and transformers
take seconds to import, and `coral-hf --help` needs neither.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoints import from_eagle
    from .decoding import CoralGenerateOutput, decoder, install, register_drafting, uninstall
    from .drafters.bigram import BigramConfig, BigramDrafter
    from .drafters.coral import CoralConfig, CoralDrafter
    from .hub import publish
    from .measure.autotune import autotune
    from .training import CoralTrainer, CoralTrainingArguments

__version__ = "0.1.0"

# public names, and the modules that are imported when they are first used
_MODULES = {
    "BigramConfig": "drafters.bigram",
    "BigramDrafter": "drafters.bigram",
    "CoralConfig": "drafters.coral",
    "CoralDrafter": "drafters.coral",
    "CoralGenerateOutput": "decoding",
    "CoralTrainer": "training",
    "CoralTrainingArguments": "training",
    "autotune": "measure.autotune",
    "decoder": "decoding",
    "from_eagle": "checkpoints",
    "install": "decoding",
    "publish": "hub",
    "register_drafting": "decoding",
    "uninstall": "decoding",
}


def __getattr__(name: str):
    """Import a public name."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Register the drafters with the Auto classes and wrap `generate`; importing does so."""
    from .decoding import install
    from .drafters import bigram, coral  # noqa: F401  both register themselves

    install()
    coral.CoralDrafter.publisher = staticmethod(lambda: importlib.import_module(f"{__name__}.hub"))


def _is_command_line() -> bool:
    """Tell whether this process runs `coral-hf` or `python -m coral_hf.cli`."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).stem == "coral-hf" or (
        program == "-m" and f"{__name__}.cli" in sys.orig_argv
    )


if not _is_command_line():
    register()

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
