"""Reports: what was run, where, and what came out.

In: settings, the environment, calls. Out: JSON, Markdown, terminal tables, plots. The calls are the
only record; every number is computed from them.
"""

import json
import os
import platform
import re
import resource
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from ..atomic import write_text
from ..identity import weights_digest
from .calls import Call
from .padding import num_padded_layers
from .plots import save
from .summary import OVERALL

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table as RichTable


class Table(NamedTuple):
    """A header and rows of as many cells, for Markdown and for the terminal alike."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    legend: str = ""

    def to_markdown(self) -> str:
        """A heading, the table, the legend."""
        heading = f"## {self.title}\n\n" if self.title else ""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        body = "".join(f"| {' | '.join(line)} |\n" for line in escaped)
        return f"{heading}{body}" + (f"\n{self.legend}" if self.legend else "")

    def to_rich(self) -> "RichTable":
        """A table for the terminal, numbers to the right."""
        from rich.table import Table as RichTable

        table = RichTable(title=self.title)
        for index, name in enumerate(self.header):
            table.add_column(name, justify="left" if index < 2 else "right")
        for cells in self.rows:
            table.add_row(*cells, style="bold" if cells[0] == OVERALL else None)
        return table


class _Dashes(Formatter):
    def format_field(self, value: Any, form: str) -> str:
        return "–" if value is None else super().format_field(value, form)


def dashed(form: str, *values: object) -> str:
    """The text of `form.format(*values)`, with a dash where nothing was measured."""
    return _Dashes().format(form, *values)


def tabulate(
    title: str, columns: Mapping[str, str], rows: Iterable[object], legend: str = ""
) -> Table:
    """A table with a row for each object; `columns` are headers and the formats of their cells."""
    cells = [[dashed(form, row) for form in columns.values()] for row in rows]
    return Table(title, [*columns], cells, legend)


@dataclass(frozen=True)
class Environment:
    """What a reader needs in order to repeat the measurement."""

    hardware: str
    num_cores: int
    num_threads: int  # of torch
    device: str
    dtype: str
    versions: dict[str, str]
    target: str
    num_target_layers: int
    num_padded_layers: int  # layers that add nothing: depth without function, see `pad_target`
    drafter: str | None
    num_drafter_parameters: int | None
    drafter_digest: str | None  # of its weights, whatever their dtype
    assistant: str | None
    process_peak_bytes: int  # of main memory, the whole process
    command: str

    @property
    def title(self) -> str:
        """The names of drafter and target."""
        return f"{self.drafter or 'No drafter'} for {self.target}"


def describe_environment(
    target: PreTrainedModel,
    drafter: PreTrainedModel | None = None,
    assistant: PreTrainedModel | None = None,
) -> Environment:
    """Describe the machine, the libraries and the models; after all calls, for the memory peak."""
    return Environment(
        hardware=hardware_name(target.device),
        num_cores=os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        device=str(target.device),
        dtype=str(target.dtype).removeprefix("torch."),
        versions=versions(),
        target=model_name(target),
        num_target_layers=target.config.get_text_config().num_hidden_layers,
        num_padded_layers=num_padded_layers(target),
        drafter=None if drafter is None else model_name(drafter),
        num_drafter_parameters=None if drafter is None else drafter.num_parameters(),
        drafter_digest=None if drafter is None else weights_digest(drafter),
        assistant=None if assistant is None else model_name(assistant),
        process_peak_bytes=process_peak_bytes(),
        command=command_line(),
    )


def process_peak_bytes() -> int:
    """The most main memory that this process has ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def hardware_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux; Python knows less of the processor
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def command_line() -> str:
    """The command as it was typed, with the last part of each path: paths are not published."""
    return shlex.join(_without_folders(word) for word in sys.argv)


def _without_folders(word: str) -> str:
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    is_path = value.startswith(("/", ".", "~")) or ("/" in value and Path(value).exists())
    return f"{option}{equals}{Path(value).name if is_path else value}"


def versions() -> dict[str, str]:
    """The versions of everything that decides over speed."""

    return {
        "coral_hf": version("coral_hf"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def model_name(model: PreTrainedModel) -> str:
    """A model's Hub id, or the last part of its folder: paths are not published."""
    name = model.config.name_or_path
    return (Path(name).name if Path(name).is_dir() else name) or type(model).__name__


@dataclass(frozen=True)
class Report:
    """What was run, where, and what came out.

    Example:
        >>> report = run_benchmark(target, drafter, tokenizer, prompts)
        >>> report.write("results")
        >>> print(report.numbers["rows"][-1].speedup)
    """

    settings: Any  # a dataclass of `settings`
    environment: Environment
    calls: list[Call]
    numbers: dict[str, Any]  # what was computed from the calls
    tables: list[Table]
    figures: dict[str, Callable[[], "Figure"]]  # by file name, drawn when they are written

    @property
    def title(self) -> str:
        """The names of drafter and target."""
        return self.environment.title

    def to_json(self) -> str:
        """Settings, environment, calls, and the numbers that are computed from the calls."""
        parts = self.numbers | {"settings": self.settings, "environment": self.environment}
        calls = {"calls": [call.to_dict() for call in self.calls]}
        return json.dumps(parts | calls, indent=1, ensure_ascii=False, default=_as_json)

    def to_markdown(self) -> str:
        """Every table with its legend, environment and settings."""
        given = [(name, str(v)) for name, v in asdict(self.settings).items() if v not in (None, [])]
        ends = [environment_table(self.environment), Table("Settings", ("setting", "value"), given)]
        parts = [table.to_markdown() for table in [*self.tables, *ends]]
        return "\n".join([f"# {self.title}\n", *parts])

    def to_rich_tables(self) -> "list[RichTable]":
        """The results for a terminal."""
        return [table.to_rich() for table in self.tables]

    def write(self, folder: str | Path) -> None:
        """Write report.json, report.md and the plots."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "report.json", self.to_json() + "\n")
        write_text(folder / "report.md", self.to_markdown())
        for name, draw in self.figures.items():
            save(draw(), folder / f"{name}.png")


def _as_json(value: Any) -> Any:
    """A dataclass as an object, a path as text."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def environment_table(environment: Environment) -> Table:
    """The environment as a table of two columns."""
    e, padded, size = environment, "", ""
    if e.num_padded_layers:
        padded = f", of which {e.num_padded_layers} add nothing (a padded target)"
    if e.num_drafter_parameters is not None:
        size = f", {e.num_drafter_parameters / 1e6:.1f} M parameters"
    peak = f"{e.process_peak_bytes / 2**20:.0f} MiB, all models and methods together"
    cells = [
        ("hardware", f"{e.hardware}, {e.num_cores} cores, {e.num_threads} torch threads"),
        ("device, dtype", f"{e.device}, {e.dtype}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in e.versions.items())),
        ("target", f"{e.target}, {e.num_target_layers} layers{padded}"),
        ("drafter", f"{e.drafter or 'none'}{size}"),
        ("assistant", e.assistant or "none"),
        ("peak memory of the process", peak),
        ("command", f"`{e.command}`"),
    ]
    return Table("Environment", ("what", "value"), cells)
