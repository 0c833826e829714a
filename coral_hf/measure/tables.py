"""The tables of a report as text cells, for Markdown and for the terminal alike."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

from .environment import Environment
from .head_timing_settings import HeadTimingSettings
from .mismatch import Mismatch
from .settings import BenchmarkSettings
from .summary import AcceptedDepth, Row
from .sweep_settings import SweepSettings

if TYPE_CHECKING:
    from rich.table import Table


class TextTable(NamedTuple):
    """A header and rows of as many cells."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def to_markdown(self) -> str:
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        body = "\n".join(f"| {' | '.join(line)} |" for line in escaped)
        return f"## {self.title}\n\n{body}\n"

    def to_rich(self) -> "Table":
        """For a terminal, numbers to the right."""
        from rich.table import Table

        table = Table(title=self.title)
        for index, name in enumerate(self.header):
            table.add_column(name, justify="left" if index < 2 else "right")
        for cells in self.rows:
            table.add_row(*cells)
        return table


RESULTS_HEADER = (
    "task",
    "method",
    "items",
    "tau / token",
    "tau / item",
    "tokens/s",
    "speed-up",
    "decoding alone",
    "speed-up / tau",
    "draft + verify + other, ms a round",
    "GPU peak, MiB",
    "exact match",
)


def results_table(rows: Sequence[Row]) -> TextTable:
    return TextTable("Results", RESULTS_HEADER, [result_cells(row) for row in rows])


def result_cells(row: Row) -> tuple[str, ...]:
    stages = [
        row.stage_milliseconds[name]
        for name in ("draft", "verify", "other")
        if name in row.stage_milliseconds
    ]
    return (
        row.task,
        row.method,
        str(row.num_items),
        decimal(row.tau_per_token),
        decimal(row.tau_per_item),
        f"{row.tokens_per_second:.1f}",
        f"{row.speedup:.2f}x",
        decimal(row.decoding_speedup),
        decimal(row.speedup_per_tau),
        " + ".join(f"{stage:.2f}" for stage in stages) or "–",
        mebibytes(row.peak_bytes),
        percent(row.exact_match),
    )


def acceptance_table(depths: Sequence[AcceptedDepth]) -> TextTable:
    header = ("method", "depth", "accepted, of all rounds", "accepted, where the parent was")
    cells = [
        (d.method, str(d.depth), percent(d.share), percent(d.share_given_parent)) for d in depths
    ]
    return TextTable("Acceptance by depth", header, cells)


def mismatch_table(mismatches: Sequence[Mismatch]) -> TextTable:
    header = ("task", "prompt", "turn", "method", "first difference at", "top-2 logit gap there")
    cells = [
        (m.task, m.prompt, str(m.turn), m.method, str(m.position), f"{m.top2_gap:.3g}")
        for m in mismatches
    ]
    return TextTable("Answers that differ from the target's own", header, cells)


def environment_table(environment: Environment) -> TextTable:
    e = environment
    padded = (
        f", of which {e.num_padded_layers} add nothing (a padded target)"
        if e.num_padded_layers
        else ""
    )
    size = (
        ""
        if e.num_drafter_parameters is None
        else f", {e.num_drafter_parameters / 1e6:.1f} M parameters"
    )
    cells = [
        ("hardware", f"{e.hardware}, {e.num_cores} cores, {e.num_threads} torch threads"),
        ("device, dtype", f"{e.device}, {e.dtype}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in e.versions.items())),
        ("target", f"{e.target}, {e.num_target_layers} layers{padded}"),
        ("drafter", f"{e.drafter or 'none'}{size}"),
        ("assistant", e.assistant or "none"),
        (
            "peak memory of the process",
            f"{e.process_peak_bytes / 2**20:.0f} MiB, all models and methods together",
        ),
        ("command", f"`{e.command}`"),
    ]
    return TextTable("Environment", ("what", "value"), cells)


def settings_table(
    settings: BenchmarkSettings | SweepSettings | HeadTimingSettings,
) -> TextTable:
    cells = [(name, str(value)) for name, value in asdict(settings).items()]
    return TextTable("Settings", ("setting", "value"), cells)


def decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.0f}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
