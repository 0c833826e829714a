"""What a drafter is worth while it is trained: acceptance decoded and simulated, and its curves.

replay (chains over a text) and decoded rounds → acceptance; curves: the plots of a run.
"""

from .acceptance import Evaluation, check_best_metric
from .curves import PlotCallback, compare_runs, plot_run

__all__ = [
    "Evaluation",
    "PlotCallback",
    "check_best_metric",
    "compare_runs",
    "plot_run",
]
