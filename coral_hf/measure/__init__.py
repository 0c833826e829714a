"""The same prompts with and without a drafter.

`read_prompts` → `run_benchmark` → `Report`, or by batch size and context: `run_sweep` →
`SweepReport`. The LM heads alone: `time_heads` → `HeadTimingReport`.
"""

from ..drafters.bigram import BigramDrafter
from .head_timing import time_heads
from .head_timing_report import HeadTimingReport
from .head_timing_settings import HEAD_SHAPES, HeadShape, HeadTimingSettings
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
    "HEAD_SHAPES",
    "HeadShape",
    "HeadTimingReport",
    "HeadTimingSettings",
    "Prompt",
    "Report",
    "SweepReport",
    "SweepSettings",
    "encode",
    "pad_target",
    "read_prompts",
    "run_benchmark",
    "run_sweep",
    "time_heads",
]
