"""What a drafter is worth while it is trained: decoded, replayed, and drawn.

rounds (the target answers prompts) and replay (chains over a text) → acceptance; plots of a run.
"""

from .acceptance import Evaluation, check_best_metric
from .plots import PlotCallback, compare_runs, plot_run
from .rounds import AnswerSettings, decoded_rounds

__all__ = [
    "AnswerSettings",
    "Evaluation",
    "PlotCallback",
    "check_best_metric",
    "compare_runs",
    "decoded_rounds",
    "plot_run",
]
