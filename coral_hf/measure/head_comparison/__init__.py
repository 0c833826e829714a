"""Draft heads of one drafter, side by side: made once, then measured in turn on the same prompts.

`HeadTrial` → `HeadComparison` → `HeadReport`.
"""

from .report import HeadReport
from .run import HeadComparison, HeadSettings
from .trial import HeadTrial

__all__ = ["HeadComparison", "HeadReport", "HeadSettings", "HeadTrial"]
