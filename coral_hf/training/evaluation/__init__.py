"""Evaluation during training: acceptance length, decoded and simulated, and plots of a run.

decoded rounds, or chain decoding replayed over a text → acceptance metrics → curves.
"""

from .acceptance import Evaluation, check_best_metric
from .curves import PlotCallback, compare_runs, plot_run
from .table import EvaluationTable
