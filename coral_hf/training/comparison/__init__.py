"""Trials compared: training runs with different settings, and draft heads of one drafter.

`Trial`s → `Comparison` → `Result`s → a table of mean and spread, or successive halving over many.
`HeadTrial`s → `HeadComparison` → `HeadReport`.
"""

from ...measure.settings import ComparisonSettings, HeadComparisonSettings
from .heads import HeadComparison, HeadReport, HeadTrial
from .trials import Comparison, Result, Trial, compare, comparison_table, halve, search

__all__ = [
    "Comparison",
    "ComparisonSettings",
    "HeadComparison",
    "HeadComparisonSettings",
    "HeadReport",
    "HeadTrial",
    "Result",
    "Trial",
    "compare",
    "comparison_table",
    "halve",
    "search",
]
