"""A picture of results: what a drafter gains from more training."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from .results import Result


def plot_scaling(results: Sequence[Result], path: Path) -> None:
    """Draw the mean τ over the tokens that were read, a line for each trial and a dot for each run.

    matplotlib is imported here, and needs no display.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for trial in dict.fromkeys(result.trial for result in results):
        own = [result for result in results if result.trial == trial]
        by_steps = [[r for r in own if r.steps == n] for n in sorted({r.steps for r in own})]
        tokens = [mean(r.num_tokens for r in runs) for runs in by_steps]
        values = [mean(r.mean_acceptance for r in runs) for runs in by_steps]
        (line,) = axes.plot(tokens, values, label=trial)
        dots = [r.num_tokens for r in own], [r.mean_acceptance for r in own]
        axes.scatter(dots[0], dots[1], s=12, color=line.get_color())
    axes.set_xscale("log")
    axes.set_xlabel("tokens read in training")
    axes.set_ylabel("τ, tokens per target pass")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.5, alpha=0.5)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
