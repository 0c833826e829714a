"""Evaluation during training: acceptance length, decoded and simulated; a table.

decoded rounds, or chain decoding replayed over a text → acceptance metrics → a table.
"""

from .acceptance import Evaluation
from .table import EvaluationTable
