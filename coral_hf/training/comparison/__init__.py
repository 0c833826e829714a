"""Trainings compared: the same data, steps, seeds and tree, different settings.

`Trial`s → `Comparison` → `Result`s → a table of mean and spread, or successive halving over many.
"""

from .halving import Rung, halve
from .plots import plot_scaling
from .report import compare, search
from .results import Result, read_results
from .run import Comparison, ComparisonSettings
from .table import comparison_table
from .trial import Trial

__all__ = [
    "Comparison",
    "ComparisonSettings",
    "Result",
    "Rung",
    "Trial",
    "compare",
    "comparison_table",
    "halve",
    "plot_scaling",
    "read_results",
    "search",
]
