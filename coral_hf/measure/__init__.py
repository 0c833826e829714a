"""Measurements of drafters: benchmark, autotune, reports,
and whether the output is the target's own.

`read_prompts` → `run_benchmark` → `Report`. One call alone: `call_generate` →
`Call`. Names are imported when they are first used: the settings alone import no torch.
"""

import importlib
from typing import Any

_HOMES = {
    "benchmark": ["run_benchmark"],
    "calls": ["Call", "call_generate"],
    "lossless": ["Verification", "verify"],
    "padding": ["pad_target"],
    "prompts": ["Prompt", "encode", "left_padded", "read_prompts"],
    "report": ["Report"],
    "settings": ["BenchmarkSettings", "VerifySettings"],
}

__all__ = sorted(sum(_HOMES.values(), []))


def __getattr__(name: str) -> Any:
    """Import a public name."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
