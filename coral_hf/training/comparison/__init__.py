"""Trials compared: training runs with different settings.

`Trial`s → `Comparison` → `Result`s → a table of mean and spread, or successive halving over many.
"""

from ...measure.settings import ComparisonSettings
from .tables import compare, comparison_table, halve, search
from .trials import Comparison, Result, Trial
