"""Trials compared: training runs with different settings, and draft heads of one drafter.

`Trial`s → `Comparison` → `Result`s → a table of mean and spread, or successive halving over many.
`HeadTrial`s → `HeadComparison` → a report.
"""

from ...measure.settings import ComparisonSettings, HeadComparisonSettings
from .heads import HeadComparison, HeadTrial
from .tables import compare, comparison_table, halve, search
from .trials import Comparison, Result, Trial
