"""Evaluation during training: acceptance length, decoded and simulated, and plots of a run.

decoded rounds, or chain decoding replayed over a text → acceptance metrics → curves.
"""

from .acceptance import Evaluation
from .curves import EvaluationTable, PlotCallback
