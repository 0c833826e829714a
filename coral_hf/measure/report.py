"""Reports of measurements: settings, environment, calls, tables; and plots, of training runs too.

In: settings, the environment, calls, named numbers. Out: JSON, Markdown, PNG. Every number is
computed from the calls. matplotlib is imported when a figure is drawn, and needs no display.
"""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from string import Formatter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pandas import DataFrame
from transformers import PreTrainedModel

from ..atomic import write_text
from ..identity import weights_digest
from .calls import Call
from .padding import num_padded_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# of the Okabe-Ito palette, distinguishable for colour-blind readers and in grey
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")


class Table(NamedTuple):
    """A header and lines of as many cells."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    legend: str = ""

    def to_markdown(self) -> str:
        """Return the heading, the table, its columns behind the second to the right, the legend."""
        heading = f"## {self.title}\n\n" if self.title else ""
        sides = ["---" if index < 2 else "--:" for index in range(len(self.header))]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in self.rows)
        lines = [self.header, sides, *escaped]
        body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return f"{heading}{body}" + (f"\n{self.legend}" if self.legend else "")


class _Dashes(Formatter):
    def format_field(self, value: Any, form: str) -> str:
        return "–" if value is None else super().format_field(value, form)


def dashed(form: str, *values: object) -> str:
    """Return `form.format(*values)`, with a dash where nothing was measured."""
    return _Dashes().format(form, *values)


def tabulate(
    title: str, columns: Mapping[str, str], rows: Iterable[object], legend: str = ""
) -> Table:
    """Make a table with a line for each object; `columns` are headers and formats of cells."""
    cells = [[dashed(form, row) for form in columns.values()] for row in rows]
    return Table(title, [*columns], cells, legend)


def describe_environment(
    target: PreTrainedModel,
    drafter: PreTrainedModel | None = None,
    assistant: PreTrainedModel | None = None,
) -> SimpleNamespace:
    """Describe the machine, the libraries and the models."""
    libraries = {name: version(name) for name in ("coral_hf", "transformers", "torch")}
    return SimpleNamespace(
        hardware=hardware_name(target.device),
        num_cores=os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        device=str(target.device),
        dtype=str(target.dtype).removeprefix("torch."),
        versions=libraries | {"python": platform.python_version()},
        target=model_name(target),
        num_target_layers=target.config.get_text_config().num_hidden_layers,
        num_padded_layers=num_padded_layers(target),  # depth without function, see `pad_target`
        drafter=drafter and model_name(drafter),
        num_drafter_parameters=drafter and drafter.num_parameters(),
        drafter_digest=drafter and weights_digest(drafter),
        assistant=assistant and model_name(assistant),
        command=command_line(),
    )


def hardware_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux; Python knows less of the processor
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def command_line() -> str:
    """Return the command as it was typed, paths cut to their last part: reports are published."""
    return shlex.join(_without_folders(word) for word in sys.argv)


def _without_folders(word: str) -> str:
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    is_path = value.startswith(("/", ".", "~")) or ("/" in value and Path(value).exists())
    return f"{option}{equals}{Path(value).name if is_path else value}"


def model_name(model: PreTrainedModel) -> str:
    """Return a model's Hub id, or the last part of its folder: reports are published."""
    name = model.config.name_or_path
    return (Path(name).name if Path(name).is_dir() else name) or type(model).__name__


@dataclass(frozen=True)
class Report:
    """A measurement: its settings, environment, calls, and the numbers computed from them.

    Example:
        >>> report = run_benchmark(target, drafter, tokenizer, prompts)
        >>> report.write("results")
        >>> print(report.numbers["rows"][-1].speedup)
    """

    settings: Any  # a dataclass of `settings`
    environment: SimpleNamespace  # of `describe_environment`
    calls: list[Call]
    numbers: dict[str, Any]  # computed from the calls
    tables: list[Table]
    figures: Mapping[str, Callable[[], "Figure"]]  # by file name, drawn when they are written

    @property
    def title(self) -> str:
        """The names of drafter and target."""
        return f"{self.environment.drafter or 'No drafter'} for {self.environment.target}"

    def to_json(self) -> str:
        """Return settings, environment, calls, and the numbers that are computed from the calls."""
        parts = self.numbers | {"settings": self.settings, "environment": vars(self.environment)}
        calls = {"calls": [call.to_dict() for call in self.calls]}
        return json.dumps(parts | calls, indent=1, ensure_ascii=False, default=_as_json)

    def to_markdown(self) -> str:
        """Return every table with its legend, environment and settings."""
        environment = vars(self.environment)
        libraries = ", ".join(map(" ".join, environment["versions"].items()))
        shown = {"versions": libraries, "command": f"`{environment['command']}`"}
        facts = {"Environment": environment | shown, "Settings": asdict(self.settings)}
        tables = list(self.tables)
        for title, part in facts.items():
            cells = [(name, str(value)) for name, value in part.items() if value not in (None, [])]
            tables.append(Table(title, ("name", "value"), cells))
        parts = [table.to_markdown() for table in tables]
        return "\n".join([f"# {self.title}\n", *parts])

    def write(self, folder: str | Path) -> None:
        """Write report.json, report.md and the plots."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "report.json", self.to_json() + "\n")
        write_text(folder / "report.md", self.to_markdown())
        for name, draw in self.figures.items():
            figure = draw()
            figure.suptitle(self.title)
            save_figure(figure, folder / f"{name}.png")


def _as_json(value: Any) -> Any:
    """Write a dataclass as an object, a path as text."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


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


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Write a figure; its folder may be missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def bar_figure(rows: Sequence[Any], group: str, height: str, **labels: str) -> "Figure":
    """Draw a number of each method by group; `group` and `height` are fields of the rows."""
    lines = DataFrame(rows, columns=["method", group, height])
    heights = lines.pivot_table(height, group, "method", sort=False)  # (groups, methods)
    figure, (axes,) = new_figure(width=max(5.0, 1.2 * len(heights)))
    if not heights.empty:
        heights.plot.bar(ax=axes, width=0.8, color=[*COLOURS], rot=0)
    axes.set(xlabel=group, **labels)
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
