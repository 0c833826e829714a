"""A sweep's report: what was run, where, and what came out by batch size and by context.

In: settings, environment, calls. Out: JSON, Markdown, terminal tables and plots. The calls are the
only record; every number is computed from them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .calls import Call
from .environment import Environment
from .plots import plot_batches, plot_contexts
from .sweep_settings import SweepSettings
from .sweep_summary import BatchRow, ContextRow, batch_rows, context_rows
from .tables import TextTable, decimal, environment_table, mebibytes, percent, settings_table

if TYPE_CHECKING:
    from rich.table import Table

BATCH_LEGEND = """\
tau: tokens of a row for each target pass that it took part in, the prompts' pass left out. Rounds
are passes of the target over all rows that go on; rounds/s without the prompts' pass, tokens/s of
all rows with it. Speed-up: seconds per token of plain `generate` on the same batch / of the method,
the median over batches. Exact match: rows whose tokens are all those of plain `generate`.
"""
CONTEXT_LEGEND = """\
Medians over repeats, one row of text, no stop. Break-even: what a round costs in plain tokens, the
tau from which on drafting pays; tau here is that of a text made of many.
"""


@dataclass(frozen=True)
class SweepReport:
    """The result of `run_sweep`."""

    settings: SweepSettings
    environment: Environment
    batch_calls: list[Call]
    context_calls: list[Call]

    @property
    def batches(self) -> list[BatchRow]:
        """By batch size and method."""
        return batch_rows(self.batch_calls)

    @property
    def contexts(self) -> list[ContextRow]:
        """By length of the context."""
        return context_rows(self.context_calls)

    @property
    def title(self) -> str:
        """Drafter and target."""
        return f"{self.environment.drafter} for {self.environment.target}"

    @property
    def tables(self) -> list[tuple[TextTable, str]]:
        """What was measured, each table with its legend."""
        tables = []
        if self.batch_calls:
            tables.append((batch_table(self.batches), BATCH_LEGEND))
        if self.context_calls:
            tables.append((context_table(self.contexts), CONTEXT_LEGEND))
        return tables

    def to_json(self) -> str:
        """All fields, and the numbers computed from them under `batches` and `contexts`."""
        computed = {
            "batches": [asdict(row) for row in self.batches],
            "contexts": [
                asdict(row)
                | {"round_milliseconds": row.round_milliseconds, "break_even": row.break_even}
                for row in self.contexts
            ],
        }
        return json.dumps(computed | asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "SweepReport":
        """Read back what `to_json` wrote; the computed numbers are computed again."""
        fields = json.loads(text)
        return cls(
            settings=SweepSettings(**fields["settings"]),
            environment=Environment(**fields["environment"]),
            batch_calls=[Call(**call) for call in fields["batch_calls"]],
            context_calls=[Call(**call) for call in fields["context_calls"]],
        )

    def to_markdown(self) -> str:
        """The tables with their legends, environment and settings."""
        parts = [part for table, legend in self.tables for part in (table.to_markdown(), legend)]
        ends = [environment_table(self.environment), settings_table(self.settings)]
        return "\n".join([f"# {self.title}\n", *parts, *(table.to_markdown() for table in ends)])

    def to_rich_tables(self) -> "list[Table]":
        """The results for a terminal."""
        return [table.to_rich() for table, _ in self.tables]

    def write(self, folder: str | Path) -> None:
        """Write report.json, report.md, and batches.png and contexts.png of what was swept."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(self.to_json() + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")
        if self.batch_calls:
            plot_batches(self.batches, folder / "batches.png", self.title)
        if self.context_calls:
            plot_contexts(self.contexts, folder / "contexts.png", self.title)


def batch_table(rows: Sequence[BatchRow]) -> TextTable:
    header = (
        *("batch size", "method", "batches", "tokens", "tau", "rounds/s", "tokens/s"),
        *("speed-up", "decoding alone", "GPU peak, MiB", "exact match"),
    )
    cells = [
        (
            str(row.batch_size),
            row.method,
            str(row.num_batches),
            str(row.num_tokens),
            decimal(row.tau),
            decimal(row.rounds_per_second),
            f"{row.tokens_per_second:.1f}",
            f"{row.speedup:.2f}x",
            decimal(row.decoding_speedup),
            mebibytes(row.peak_bytes),
            percent(row.exact_match),
        )
        for row in rows
    ]
    return TextTable("By batch size", header, cells)


def context_table(rows: Sequence[ContextRow]) -> TextTable:
    header = (
        *("context", "plain, ms a token", "draft + verify + other, ms a round", "round, ms"),
        *("break-even", "tau", "prefill, plain, ms", "prefill, coral, ms", "GPU peak, MiB"),
    )
    cells = [
        (
            str(row.context),
            decimal(row.plain_milliseconds),
            f"{row.draft_milliseconds:.2f} + {row.verify_milliseconds:.2f}"
            f" + {row.other_milliseconds:.2f}",
            decimal(row.round_milliseconds),
            decimal(row.break_even),
            decimal(row.tau),
            decimal(row.plain_prefill_milliseconds),
            decimal(row.prefill_milliseconds),
            mebibytes(row.peak_bytes),
        )
        for row in rows
    ]
    return TextTable("By context", header, cells)
