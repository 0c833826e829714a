"""CORAL: speculative decoding with learned drafters, for Hugging Face transformers.

`import coral_hf` registers the drafters with the Auto classes and lets `generate` take them as
`assistant_model`. In the program `coral-hf` it does so when a command runs: torch and transformers
take seconds to import, and `coral-hf --help` needs neither.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoints import import_drafter as import_drafter
    from .decoding import CoralGenerateOutput as CoralGenerateOutput
    from .decoding import install as install
    from .decoding import register_drafting as register_drafting
    from .decoding import register_input as register_input
    from .decoding import uninstall as uninstall
    from .decoding import warm_up as warm_up
    from .drafters.coral import CoralConfig as CoralConfig
    from .drafters.coral import CoralDrafter as CoralDrafter
    from .drafters.eagle3 import Eagle3Config as Eagle3Config
    from .drafters.eagle3 import Eagle3Drafter as Eagle3Drafter
    from .drafters.eagle3 import ParallelConfig as ParallelConfig
    from .drafters.eagle3 import ParallelDrafter as ParallelDrafter
    from .drafters.language_model import LanguageModelDrafter as LanguageModelDrafter
    from .drafters.medusa import MedusaConfig as MedusaConfig
    from .drafters.medusa import MedusaDrafter as MedusaDrafter
    from .drafters.recurrent import RecurrentConfig as RecurrentConfig
    from .drafters.recurrent import RecurrentDrafter as RecurrentDrafter
    from .hub import publish as publish
    from .measure.autotune import autotune as autotune
    from .measure.lossless import verify as verify
    from .training import AssistantTrainer as AssistantTrainer
    from .training import AssistantTrainingArguments as AssistantTrainingArguments
    from .training import CoralTrainer as CoralTrainer
    from .training import CoralTrainingArguments as CoralTrainingArguments
    from .training.planning.plan import plan as plan

__version__ = "0.2.0"

# public names, and the modules that are imported when they are first used
_MODULES = {
    "checkpoints": ["import_drafter"],
    "decoding": [
        "CoralGenerateOutput",
        "install",
        "register_drafting",
        "register_input",
        "uninstall",
        "warm_up",
    ],
    "drafters.coral": ["CoralConfig", "CoralDrafter"],
    "drafters.eagle3": ["Eagle3Config", "Eagle3Drafter", "ParallelConfig", "ParallelDrafter"],
    "drafters.language_model": ["LanguageModelDrafter"],
    "drafters.medusa": ["MedusaConfig", "MedusaDrafter"],
    "drafters.recurrent": ["RecurrentConfig", "RecurrentDrafter"],
    "hub": ["publish"],
    "measure.autotune": ["autotune"],
    "measure.lossless": ["verify"],
    "training.arguments": ["AssistantTrainingArguments", "CoralTrainingArguments"],
    "training.assistant": ["AssistantTrainer"],
    "training.planning.plan": ["plan"],
    "training.trainer": ["CoralTrainer"],
}
__all__ = sorted(sum(_MODULES.values(), []))


def __getattr__(name: str):
    """Import a public name."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Register the drafters with the Auto classes and wrap `generate`; importing does so."""
    from .decoding import install

    # they register themselves
    from .drafters import coral, eagle3, language_model, medusa, recurrent  # noqa: F401
    from .drafters.model import Drafter

    install()
    Drafter.publisher = staticmethod(lambda: importlib.import_module(f"{__name__}.hub"))


def _is_command_line() -> bool:
    """Tell whether this process runs `coral-hf` or `python -m coral_hf.cli`."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).stem == "coral-hf" or (
        program == "-m" and f"{__name__}.cli" in sys.orig_argv
    )


if not _is_command_line():
    register()
