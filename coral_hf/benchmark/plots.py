"""The pictures of a report: acceptance by depth, speed-up by task.

In: rows. Out: PNG files. matplotlib is imported when a picture is drawn, and needs no display.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .summary import AcceptedDepth, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of the Okabe-Ito palette, told apart by colour-blind readers and in grey
COLOURS = {
    "plain": "#999999",
    "coral": "#D55E00",
    "bigram": "#E69F00",
    "prompt_lookup": "#56B4E9",
    "assisted": "#009E73",
}
BAR_ROOM = 0.8  # of the distance between two groups of bars


@contextmanager
def figure(path: Path, num_groups: int) -> Iterator["Axes"]:
    """Axes on a canvas as wide as its groups of bars need, saved to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(
        Figure(figsize=(max(5.0, 1.2 * num_groups), 3.6), dpi=150, layout="constrained")
    )
    axes = canvas.figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    yield axes
    canvas.figure.savefig(path)


def plot_acceptance(depths: Sequence[AcceptedDepth], path: Path, title: str) -> None:
    """Bars: share of all rounds that accept a node at a depth; dots: of those that got so far."""
    methods = list(dict.fromkeys(entry.method for entry in depths))
    deepest = max((entry.depth for entry in depths), default=1)
    with figure(path, deepest) as axes:
        width = BAR_ROOM / max(len(methods), 1)
        for index, method in enumerate(methods):
            entries = [entry for entry in depths if entry.method == method]
            offset = (index - (len(methods) - 1) / 2) * width
            x = [entry.depth + offset for entry in entries]
            colour = COLOURS[method]
            axes.bar(
                x,
                [100 * e.share for e in entries],
                width,
                color=colour,
                label=f"{method}, all rounds",
            )
            given = [100 * e.share_given_parent for e in entries]
            axes.plot(x, given, "o", color=colour, mec="black", label=f"{method}, parent accepted")
        axes.set(
            title=title,
            xlabel="depth in the tree",
            ylabel="rounds that accept a node, %",
            ylim=(0, 105),
        )
        axes.set_xticks(range(1, deepest + 1))
        add_legend(axes)


def plot_speedups(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars: median speed-up of each method over plain `generate`, by task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    methods = [method for method in dict.fromkeys(row.method for row in rows) if method != "plain"]
    with figure(path, len(tasks)) as axes:
        width = BAR_ROOM / max(len(methods), 1)
        for index, method in enumerate(methods):
            heights = {row.task: row.speedup for row in rows if row.method == method}
            x = [tasks.index(task) + (index - (len(methods) - 1) / 2) * width for task in heights]
            bars = axes.bar(x, list(heights.values()), width, color=COLOURS[method], label=method)
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
        axes.axhline(1.0, color=COLOURS["plain"], linewidth=1, label="plain")
        axes.set(title=title, ylabel="speed-up, median over prompts")
        axes.set_xticks(range(len(tasks)), tasks)
        add_legend(axes)


def add_legend(axes: "Axes") -> None:
    """Below the axes, where it hides no bar."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18)
        )
