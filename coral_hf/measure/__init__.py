"""One way to call `generate` and count: benchmark, sweep, autotune, and the reports of them.

`read_prompts` → `run_benchmark`, or by batch size and context `run_sweep` → `Report`. One call
alone: `call_generate` → `Call`. Names are imported when they are first
asked for, so that the settings alone cost no import of torch.
"""

import importlib
from typing import Any

_HOMES = {
    "benchmark": ["run_benchmark"],
    "calls": ["AnswerSettings", "Bench", "Call", "call_generate", "decoded_rounds"],
    "padding": ["pad_target"],
    "prompts": ["Prompt", "encode", "left_padded", "read_prompts"],
    "report": ["Report"],
    "settings": ["BenchmarkSettings", "SweepSettings"],
    "sweep": ["run_sweep"],
}
_LAZY = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    """A public name, from the file that has it."""
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
