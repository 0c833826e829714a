"""The same prompts with and without a drafter: `read_prompts` → `run_benchmark` → `Report`."""

from .baselines import BigramDrafter
from .measure import run_benchmark
from .padding import pad_target
from .prompts import Prompt, encode, read_prompts
from .report import Report
from .settings import BenchmarkSettings

__all__ = [
    "BenchmarkSettings",
    "BigramDrafter",
    "Prompt",
    "Report",
    "encode",
    "pad_target",
    "read_prompts",
    "run_benchmark",
]
