"""The report of `time_heads`: on what machine, and what came out.

In: settings, machine, seconds of every call. Out: JSON, Markdown, a terminal table. The calls are
the only record; every number is computed from them.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, NamedTuple

import torch

from .environment import command_line, hardware_name, versions
from .head_timing_settings import HeadShape, HeadTimingSettings
from .tables import TextTable, settings_table

if TYPE_CHECKING:
    from rich.table import Table

TITLE = "LM heads, timed alone"
LEGEND = """\
Random weights and features: what a head costs follows from what it reads. One call is a level of
the draft tree of one text: router, logits and ranking; `read` counts its weights, router included.
Milliseconds and speed-up (the full head's time / this one's, in the same turn): median and, in
brackets, the quartiles. GB/s: what is read in the median time.
"""


class Spread(NamedTuple):
    """The middle of some measurements and the range of half of them."""

    median: float
    low: float  # the first quartile
    high: float  # the third

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def to_text(self, digits: int, unit: str = "") -> str:
        return f"{self.median:.{digits}f}{unit} ({self.low:.{digits}f} – {self.high:.{digits}f})"


@dataclass(frozen=True)
class Machine:
    """What a reader needs in order to repeat the measurement."""

    hardware: str
    num_cores: int
    num_threads: int  # of torch
    device: str
    versions: dict[str, str]
    command: str


def describe_machine(device: torch.device) -> Machine:
    return Machine(
        hardware=hardware_name(device),
        num_cores=os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        device=str(device),
        versions=versions(),
        command=command_line(),
    )


@dataclass(frozen=True)
class HeadTimes:
    """The calls of one head."""

    shape: str
    dtype: str
    rows: int
    num_groups: int | None  # None for the full head
    num_active: int | None
    read_bytes: int  # of weights, by one call
    seconds: list[float]  # of each turn

    @property
    def is_full(self) -> bool:
        return self.num_groups is None


class HeadRow(NamedTuple):
    """What the calls of one head come to."""

    times: HeadTimes
    milliseconds: Spread
    speedup: Spread  # over the full head, turn by turn
    gigabytes_per_second: float


@dataclass(frozen=True)
class HeadTimingReport:
    """The result of `time_heads`.

    Example:
        >>> report = time_heads(HeadTimingSettings(repeats=5))
        >>> report.write("heads")
        >>> print(report.rows[1].speedup.median)
    """

    settings: HeadTimingSettings
    machine: Machine
    times: list[HeadTimes]

    @property
    def rows(self) -> list[HeadRow]:
        """Each head beside the full one of its shape, dtype and number of rows."""
        full = {(t.shape, t.dtype, t.rows): t.seconds for t in self.times if t.is_full}
        return [_row(times, full[times.shape, times.dtype, times.rows]) for times in self.times]

    def to_json(self) -> str:
        """All fields, and the numbers computed from them under `rows`."""
        computed = [
            {
                "milliseconds": row.milliseconds._asdict(),
                "speedup": row.speedup._asdict(),
                "gigabytes_per_second": row.gigabytes_per_second,
            }
            for row in self.rows
        ]
        return json.dumps({"rows": computed} | asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "HeadTimingReport":
        """Read back what `to_json` wrote; the computed numbers are computed again."""
        fields = json.loads(text)
        settings = fields["settings"]
        shapes = [HeadShape(*shape) for shape in settings.pop("shapes")]
        return cls(
            settings=HeadTimingSettings(shapes=shapes, **settings),
            machine=Machine(**fields["machine"]),
            times=[HeadTimes(**times) for times in fields["times"]],
        )

    def to_markdown(self) -> str:
        """The results, the legend, machine and settings."""
        ends = [machine_table(self.machine), settings_table(self.settings)]
        results = heads_table(self.rows).to_markdown()
        return "\n".join([f"# {TITLE}\n", results, LEGEND, *(end.to_markdown() for end in ends)])

    def to_rich_table(self) -> "Table":
        """The results for a terminal."""
        return heads_table(self.rows)._replace(title=TITLE).to_rich()

    def write(self, folder: str | Path) -> None:
        """Write report.json and report.md."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(self.to_json() + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")


def _row(times: HeadTimes, full_seconds: Sequence[float]) -> HeadRow:
    milliseconds = Spread.of([1000 * seconds for seconds in times.seconds])
    ratios = [full / own for full, own in zip(full_seconds, times.seconds, strict=True)]
    rate = times.read_bytes / 1e6 / milliseconds.median
    return HeadRow(times, milliseconds, Spread.of(ratios), rate)


def heads_table(rows: Sequence[HeadRow]) -> TextTable:
    header = ("head of", "dtype", "rows", "groups read", "read, MiB", "ms", "speed-up", "GB/s")
    cells = [
        (
            times.shape,
            times.dtype,
            str(times.rows),
            "all: full head" if times.is_full else f"{times.num_active} of {times.num_groups}",
            f"{times.read_bytes / 2**20:.0f}",
            milliseconds.to_text(2),
            "–" if times.is_full else speedup.to_text(2, "x"),
            f"{rate:.1f}",
        )
        for times, milliseconds, speedup, rate in rows
    ]
    return TextTable("Results", header, cells)


def machine_table(machine: Machine) -> TextTable:
    m = machine
    cells = [
        ("hardware", f"{m.hardware}, {m.num_cores} cores, {m.num_threads} torch threads"),
        ("device", m.device),
        ("versions", ", ".join(f"{name} {version}" for name, version in m.versions.items())),
        ("command", f"`{m.command}`"),
    ]
    return TextTable("Machine", ("what", "value"), cells)
