"""The same prompts with and without a drafter.

`read_prompts` → `run_benchmark` → `Report`, or by batch size and context: `run_sweep` →
`SweepReport`.
"""

from .baselines import BigramDrafter
from .measure import run_benchmark
from .padding import pad_target
from .prompts import Prompt, encode, read_prompts
from .report import Report
from .settings import BenchmarkSettings
from .sweep import run_sweep
from .sweep_report import SweepReport
from .sweep_settings import SweepSettings

__all__ = [
    "BenchmarkSettings",
    "BigramDrafter",
    "Prompt",
    "Report",
    "SweepReport",
    "SweepSettings",
    "encode",
    "pad_target",
    "read_prompts",
    "run_benchmark",
    "run_sweep",
]
