"""Plots of reports and training runs.

In: named series of numbers. Out: figures, saved as PNG. matplotlib is imported when a figure is
drawn, and needs no display.
"""

from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pandas import DataFrame

from .summary import AcceptedDepth, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# of the Okabe-Ito palette, distinguishable for colour-blind readers and in grey
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
PLAIN = COLOURS[-1]
BAR_ROOM = 0.8  # of the distance between two groups of bars


class Line(NamedTuple):
    """A curve and how it is drawn."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "-"
    colour: str | None = None


def new_figure(
    num_panels: int = 1, width: float = 5.0, height: float = 3.6
) -> tuple["Figure", list["Axes"]]:
    """Make a figure with panels side by side, each `width` inches wide."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * num_panels, height), dpi=150, layout="constrained")
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
        axes.set_axisbelow(True)
    return figure, panels


def add_legend(axes: "Axes") -> None:
    """Put the legend below the axes, where it hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}
        axes.legend(frameon=False, fontsize=8, ncols=2, **place)


def save(figure: "Figure", path: str | Path) -> Path:
    """Write a figure; its folder may be missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def bar_figure(heights: DataFrame, **labels: Any) -> "Figure":
    """Draw bars side by side, in each group one of each series.

    Args:
        heights: (groups, series).
        labels: `xlabel`, `ylabel`.
    """
    figure, (axes,) = new_figure(width=max(5.0, 1.2 * len(heights)))
    own = cycle(COLOURS[:-1])
    colours = [PLAIN if name == "plain" else next(own) for name in heights]
    if not heights.empty:
        heights.plot.bar(ax=axes, width=BAR_ROOM, color=colours, rot=0)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)  # which pandas turns off
    axes.set(**labels)
    add_legend(axes)
    return figure


def bars_of(rows: Sequence[Any], group: str, height: str) -> DataFrame:
    """Arrange the bars of each method, (groups, methods); the names are fields of the rows."""
    lines = DataFrame(rows, columns=["method", group, height])
    return lines.pivot_table(height, group, "method", sort=False)


def line_figure(lines: Sequence[Line], **labels: str) -> "Figure":
    """Draw a figure of curves; `labels` are `title`, `xlabel`, `ylabel`."""
    figure, (axes,) = new_figure()
    draw_lines(axes, lines)
    axes.set(**labels)
    return figure


def draw_lines(axes: "Axes", lines: Iterable[Line]) -> None:
    """Draw curves and their legend; a curve of a single point becomes a dot."""
    for index, (label, x, y, style, colour) in enumerate(lines):
        style = "." if len(x) == 1 and style == "-" else style
        colour = colour or COLOURS[index % len(COLOURS)]
        axes.plot(x, y, style, color=colour, markersize=4, linewidth=1.2, label=label)
    add_legend(axes)


def acceptance_figure(depths: Sequence[AcceptedDepth]) -> "Figure":
    """Draw the share of rounds that accept a node at a depth; as dots, of those that reach it."""
    figure = bar_figure(bars_of(depths, "depth", "share"), xlabel="depth in the tree")
    (axes,) = figure.axes
    axes.set(ylabel="rounds that accept a node", ylim=(0, 1.05))
    axes.yaxis.set_major_formatter("{x:.0%}")
    dots = bars_of(depths, "depth", "share_given_parent")
    for bars, (method, heights) in zip(axes.containers, dots.items(), strict=True):
        x, colour = [bar.get_center()[0] for bar in bars], bars[0].get_facecolor()
        label = f"{method}, of those whose parent was accepted"
        axes.plot(x, heights, "o", color=colour, mec="black", label=label)
    add_legend(axes)
    return figure


def speed_figure(rows: Sequence[Row], group: str, height: str, **labels: Any) -> "Figure":
    """Draw the speed of each method by group, with its median speed-up over plain `generate`."""
    figure = bar_figure(bars_of(rows, group, height), **labels)
    axes: Any = figure.axes[0]
    speedups = bars_of(rows, group, "speedup").items()
    for bars, (method, values) in zip(axes.containers, speedups, strict=True):
        if method != "plain":
            axes.bar_label(bars, [f"{value:.2f}x" for value in values], fontsize=8)
    return figure
