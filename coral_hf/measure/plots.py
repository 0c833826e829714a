"""The pictures of a report: acceptance by depth, speed-up by task, by batch size, by context.

In: rows. Out: PNG files. matplotlib is imported when a picture is drawn, and needs no display.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .summary import AcceptedDepth, Row
from .sweep_summary import BatchRow, ContextRow

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
STAGE_COLOURS = {"draft": "#D55E00", "verify": "#0072B2", "other": "#CC79A7"}
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


def plot_batches(rows: Sequence[BatchRow], path: Path, title: str) -> None:
    """Bars: tokens per second of both methods by batch size, the drafter's with its speed-up."""
    sizes = list(dict.fromkeys(row.batch_size for row in rows))
    with figure(path, len(sizes)) as axes:
        width = BAR_ROOM / 2
        for index, method in enumerate(dict.fromkeys(row.method for row in rows)):
            own = [row for row in rows if row.method == method]
            x = [sizes.index(row.batch_size) + (index - 0.5) * width for row in own]
            heights = [row.tokens_per_second for row in own]
            bars = axes.bar(x, heights, width, color=COLOURS[method], label=method)
            if method != "plain":
                axes.bar_label(bars, [f"{row.speedup:.2f}x" for row in own], fontsize=8)
        axes.set(title=title, xlabel="batch size", ylabel="tokens/s of all rows")
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        add_legend(axes)


def plot_contexts(rows: Sequence[ContextRow], path: Path, title: str) -> None:
    """Stacked bars: the stages of a round by context; dots: a plain token."""
    stages = {
        "draft": [row.draft_milliseconds for row in rows],
        "verify": [row.verify_milliseconds for row in rows],
        "other": [row.other_milliseconds for row in rows],
    }
    x = range(len(rows))
    with figure(path, len(rows)) as axes:
        bottoms = [0.0] * len(rows)
        for stage, heights in stages.items():
            colour = STAGE_COLOURS[stage]
            axes.bar(x, heights, BAR_ROOM / 2, bottom=bottoms, color=colour, label=stage)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        plain = [row.plain_milliseconds for row in rows]
        axes.plot(x, plain, "o", color=COLOURS["plain"], mec="black", label="a plain token")
        axes.set(title=title, xlabel="context, tokens", ylabel="ms a round")
        axes.set_xticks(x, [str(row.context) for row in rows])
        add_legend(axes)


def add_legend(axes: "Axes") -> None:
    """Below the axes, where it hides no bar."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18)
        )
