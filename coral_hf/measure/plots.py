"""Plots of reports and training runs.

In: named series of numbers. Out: figures, saved as PNG. matplotlib is imported when a figure is
drawn, and needs no display.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .calls import ROUND_STAGES
from .summary import AcceptedDepth, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# of the Okabe-Ito palette, distinguishable for colour-blind readers and in grey
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
PLAIN = COLOURS[-1]
BAR_ROOM = 0.8  # of the distance between two groups of bars

READABLE = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none"}  # text on any colour

Bars = Mapping[str, Mapping[Any, float]]  # series → group → height


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


def bar_figure(
    bars: Bars, text: Callable[[str, Any], str] = lambda name, group: "", **labels: Any
) -> "Figure":
    """Draw bars side by side, in each group one of each series.

    Args:
        text: gives what is written above the bar of a series and group.
        labels: `title`, `xlabel`, `ylabel`.
    """
    groups = list(dict.fromkeys(group for heights in bars.values() for group in heights))
    figure, (axes,) = new_figure(width=max(5.0, 1.2 * len(groups)))
    width, colours = BAR_ROOM / max(len(bars), 1), cycle(COLOURS[:-1])
    for index, (name, heights) in enumerate(bars.items()):
        colour = PLAIN if name == "plain" else next(colours)
        x = [groups.index(group) + (index - (len(bars) - 1) / 2) * width for group in heights]
        drawn = axes.bar(x, list(heights.values()), width, color=colour, label=name)
        axes.bar_label(drawn, [text(name, group) for group in heights], fontsize=8)
    axes.set(**labels)
    axes.set_xticks(range(len(groups)), [str(group) for group in groups])
    add_legend(axes)
    return figure


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


def bars_of(rows: Iterable[Any], group: str, height: str) -> dict[str, dict[Any, float]]:
    """Collect the bars of each method; `group` and `height` are fields of the rows."""
    bars: dict[str, dict[Any, float]] = {}
    for row in rows:
        bars.setdefault(row.method, {})[vars(row)[group]] = vars(row)[height]
    return bars


def acceptance_figure(depths: Sequence[AcceptedDepth], title: str) -> "Figure":
    """Draw the share of rounds that accept a node at a depth; as dots, of those that reach it."""
    labels: dict[str, Any] = {"title": title, "xlabel": "depth in the tree"}
    labels |= {"ylabel": "rounds that accept a node", "ylim": (0, 1.05)}
    figure = bar_figure(bars_of(depths, "depth", "share"), **labels)
    (axes,) = figure.axes
    axes.yaxis.set_major_formatter("{x:.0%}")
    dots = bars_of(depths, "depth", "share_given_parent")
    for bars, (method, heights) in zip(axes.containers, dots.items(), strict=True):
        x, colour = [bar.get_center()[0] for bar in bars], bars[0].get_facecolor()
        label = f"{method}, of those whose parent was accepted"
        axes.plot(x, list(heights.values()), "o", color=colour, mec="black", label=label)
    add_legend(axes)
    return figure


def speedup_figure(rows: Sequence[Row], title: str) -> "Figure":
    """Draw the median speed-up of each method over plain `generate`, by task."""
    bars = bars_of((row for row in rows if row.method != "plain"), "task", "speedup")
    labels = {"title": title, "ylabel": "speed-up, median over prompts"}
    figure = bar_figure(bars, lambda name, task: f"{bars[name][task]:.2f}", **labels)
    figure.axes[0].axhline(1.0, color=PLAIN, linewidth=1, label="plain")
    add_legend(figure.axes[0])
    return figure


def batch_figure(rows: Sequence[Row], title: str) -> "Figure":
    """Draw tokens per second of both methods by batch size, the drafter's with its speed-up."""
    speedups = bars_of(rows, "batch_size", "speedup")
    labels = {"title": title, "xlabel": "batch size", "ylabel": "tokens/s of all rows"}
    return bar_figure(
        bars_of(rows, "batch_size", "tokens_per_second"),
        lambda name, size: "" if name == "plain" else f"{speedups[name][size]:.2f}x",
        **labels,
    )


def context_figure(rows: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Draw the stages of a round by context as stacked bars, and a plain token as dots."""
    figure, (axes,) = new_figure(width=max(5.0, 1.2 * len(rows)))
    x, bottoms = range(len(rows)), [0.0] * len(rows)
    for stage, colour in zip(ROUND_STAGES, COLOURS, strict=False):
        own = [row[f"{stage}_milliseconds"] for row in rows]
        axes.bar(x, own, BAR_ROOM / 2, bottom=bottoms, color=colour, label=stage)
        bottoms = [bottom + height for bottom, height in zip(bottoms, own, strict=True)]
    plain = [row["plain_milliseconds"] for row in rows]
    axes.plot(x, plain, "o", color=PLAIN, mec="black", label="a plain token")
    axes.set(title=title, xlabel="context, tokens", ylabel="ms a round")
    axes.set_xticks(x, [str(row["context"]) for row in rows])
    add_legend(axes)
    return figure


def heat_maps(maps: Mapping[str, "DataFrame"]) -> "Figure":
    """Draw a heat map for each title; the lightest cell is the best, the last map's the smallest.

    The index and columns of a table, (shares, groups), become its axes.
    """
    figure, panels = new_figure(len(maps), 4.5, 0.8 * len(next(iter(maps.values()))) + 1.6)
    colours = ("viridis", "viridis_r")
    for axes, (title, table), colour in zip(panels, maps.items(), colours, strict=True):
        axes.imshow(table, cmap=colour, aspect="auto")
        axes.grid(visible=False)
        for (y, x), value in np.ndenumerate(table):
            if value == value:
                axes.text(x, y, f"{value:.1%}", bbox=READABLE, ha="center", va="center")
        axes.set_xticks(range(table.shape[1]), [str(groups) for groups in table.columns])
        axes.set_yticks(range(table.shape[0]), [f"1/{1 / share:g}" for share in table.index])
        axes.set(title=title, xlabel=table.columns.name, ylabel=table.index.name)
    return figure
