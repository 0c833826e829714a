"""Plots of reports and training runs.

In: named series of numbers. Out: figures, saved as PNG. matplotlib is imported when a figure is
drawn, and needs no display.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .summary import AcceptedDepth, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# of the Okabe-Ito palette, told apart by colour-blind readers and in grey
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
PLAIN = COLOURS[-1]
BAR_ROOM = 0.8  # of the distance between two groups of bars

READABLE = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none"}  # text on any colour

Bars = Mapping[str, Mapping[Any, float]]  # series → group → height
Cells = Mapping[tuple[float, float], float]  # (x, y) → value


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
    """A figure with panels side by side, each `width` wide."""
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
    bars: Bars, text: Callable[[str, Any], str] | None = None, **labels: Any
) -> "Figure":
    """A figure of bars side by side, for each group one of each series.

    Args:
        text: gives what is written above the bar of a series and group.
        labels: `title`, `xlabel`, `ylabel`.
    """
    groups = list(dict.fromkeys(group for heights in bars.values() for group in heights))
    figure, (axes,) = new_figure(width=max(5.0, 1.2 * len(groups)))
    width = BAR_ROOM / max(len(bars), 1)
    for index, (name, heights) in enumerate(bars.items()):
        x = [groups.index(group) + (index - (len(bars) - 1) / 2) * width for group in heights]
        drawn = axes.bar(x, list(heights.values()), width, color=colour_of(name, index), label=name)
        if text is not None:
            axes.bar_label(drawn, [text(name, group) for group in heights], fontsize=8)
    axes.set(**labels)
    axes.set_xticks(range(len(groups)), [str(group) for group in groups])
    add_legend(axes)
    return figure


def line_figure(lines: Sequence[Line], **labels: str) -> "Figure":
    """A figure of curves; `labels` are `title`, `xlabel`, `ylabel`."""
    figure, (axes,) = new_figure()
    draw_lines(axes, lines)
    axes.set(**labels)
    return figure


def colour_of(name: str, index: int) -> str:
    """The colour of a series; grey is plain's."""
    return PLAIN if name == "plain" else COLOURS[index % (len(COLOURS) - 1)]


def draw_lines(axes: "Axes", lines: Iterable[Line]) -> None:
    """Draw curves and their legend; a curve of one point would not be seen, so it is a dot."""
    for index, (label, x, y, style, colour) in enumerate(lines):
        style = "." if len(x) == 1 and style == "-" else style
        colour = colour or COLOURS[index % len(COLOURS)]
        axes.plot(x, y, style, color=colour, markersize=4, linewidth=1.2, label=label)
    add_legend(axes)


def acceptance_figure(depths: Sequence[AcceptedDepth], title: str) -> "Figure":
    """Bars: share of all rounds that accept a node at a depth; dots: of those that got so far."""
    methods = dict.fromkeys(entry.method for entry in depths)
    bars = {
        f"{name}, all rounds": {e.depth: 100 * e.share for e in depths if e.method == name}
        for name in methods
    }
    labels: dict[str, Any] = {"title": title, "xlabel": "depth in the tree"}
    figure = bar_figure(bars, ylabel="rounds that accept a node, %", ylim=(0, 105), **labels)
    (axes,) = figure.axes
    for container, name in zip(axes.containers, methods, strict=True):
        x = [bar.get_x() + bar.get_width() / 2 for bar in container]
        given = [100 * entry.share_given_parent for entry in depths if entry.method == name]
        colour = container[0].get_facecolor()
        axes.plot(x, given, "o", color=colour, mec="black", label=f"{name}, parent accepted")
    add_legend(axes)
    return figure


def speedup_figure(rows: Sequence[Row], title: str) -> "Figure":
    """Bars: median speed-up of each method over plain `generate`, by task."""
    bars = {
        name: {row.task: row.speedup for row in rows if row.method == name}
        for name in dict.fromkeys(row.method for row in rows)
        if name != "plain"
    }
    labels = {"title": title, "ylabel": "speed-up, median over prompts"}
    figure = bar_figure(bars, lambda name, task: f"{bars[name][task]:.2f}", **labels)
    (axes,) = figure.axes
    axes.axhline(1.0, color=PLAIN, linewidth=1, label="plain")
    add_legend(axes)
    return figure


def batch_figure(rows: Sequence[Row], title: str) -> "Figure":
    """Bars: tokens per second of both methods by batch size, the drafter's with its speed-up."""
    found = {(row.method, row.batch_size): row for row in rows}
    bars: dict[str, dict] = {}
    for (method, size), row in found.items():
        bars.setdefault(method, {})[size] = row.tokens_per_second

    def speedup(method: str, size: Any) -> str:
        return "" if method == "plain" else f"{found[method, size].speedup:.2f}x"

    labels = {"title": title, "xlabel": "batch size", "ylabel": "tokens/s of all rows"}
    return bar_figure(bars, speedup, **labels)


def context_figure(rows: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Stacked bars: the stages of a round by context; dots: a plain token."""
    figure, (axes,) = new_figure(width=max(5.0, 1.2 * len(rows)))
    x, bottoms = range(len(rows)), [0.0] * len(rows)
    for stage, colour in zip(("draft", "verify", "other"), COLOURS, strict=False):
        own = [row[f"{stage}_milliseconds"] for row in rows]
        axes.bar(x, own, BAR_ROOM / 2, bottom=bottoms, color=colour, label=stage)
        bottoms = [bottom + height for bottom, height in zip(bottoms, own, strict=True)]
    plain = [row["plain_milliseconds"] for row in rows]
    axes.plot(x, plain, "o", color=PLAIN, mec="black", label="a plain token")
    axes.set(title=title, xlabel="context, tokens", ylabel="ms a round")
    axes.set_xticks(x, [str(row["context"]) for row in rows])
    add_legend(axes)
    return figure


def heat_maps(maps: Mapping[str, Cells], xlabel: str, ylabel: str) -> "Figure":
    """A heat map for each title; the lightest cell is the best, the last map's the smallest."""
    columns, lines = (sorted({key[i] for cells in maps.values() for key in cells}) for i in (0, 1))
    figure, panels = new_figure(len(maps), 4.5, 0.8 * len(lines) + 1.6)
    for (title, cells), axes, colours in zip(
        maps.items(), panels, ("viridis", "viridis_r"), strict=False
    ):
        values = [[cells.get((x, y), float("nan")) for x in columns] for y in lines]
        axes.imshow(values, cmap=colours, aspect="auto")
        axes.grid(visible=False)
        for (x, y), value in cells.items():
            at = columns.index(x), lines.index(y)
            axes.text(*at, f"{value:.1%}", bbox=READABLE, ha="center", va="center")
        axes.set_xticks(range(len(columns)), [str(x) for x in columns])
        axes.set_yticks(range(len(lines)), [f"1/{1 / y:g}" for y in lines])
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure
