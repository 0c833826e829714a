"""A benchmark's report: what was run, where, and what came out.

In: settings, environment, runs. Out: JSON, Markdown, a terminal table and plots. The runs are the
only record; every number is computed from them.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .environment import Environment
from .mismatch import Mismatch
from .plots import plot_acceptance, plot_speedups
from .runs import Run
from .settings import BenchmarkSettings
from .summary import OVERALL, AcceptedDepth, Row, accepted_depths, summarise
from .tables import (
    acceptance_table,
    environment_table,
    mismatch_table,
    results_table,
    settings_table,
)

if TYPE_CHECKING:
    from rich.table import Table

LEGEND = """\
tau: tokens for each target pass after the first, which is the prefill; by token (all tokens / all
passes) and by item (mean of the items' ratios). Speed-up: seconds per token of plain `generate` /
of the method, prefill included, the median over items. Speed-up / tau: what drafting and wider
passes leave of tau. Exact match: answers whose tokens are all those of plain `generate`; a gap of
about the dtype's rounding is a tie that fell the other way.
"""


@dataclass(frozen=True)
class Report:
    """The result of `run_benchmark`.

    Example:
        >>> report = run_benchmark(target, drafter, tokenizer, prompts)
        >>> report.write("results")
        >>> print(report.rows[-1].speedup)
    """

    settings: BenchmarkSettings
    environment: Environment
    runs: list[Run]
    mismatches: list[Mismatch]  # greedy only
    skipped: list[str]  # task/id of the prompts that do not fit the target's context

    @property
    def rows(self) -> list[Row]:
        """By task and method, the overall rows last."""
        return summarise(self.runs)

    @property
    def acceptance(self) -> list[AcceptedDepth]:
        """By method and depth, over all tasks."""
        return accepted_depths(self.runs)

    def to_json(self) -> str:
        """All fields, and the numbers computed from them under `rows` and `acceptance`."""
        computed = {
            "rows": [asdict(row) for row in self.rows],
            "acceptance": [asdict(depth) for depth in self.acceptance],
        }
        return json.dumps(computed | asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read back what `to_json` wrote; the computed numbers are computed again."""
        fields = json.loads(text)
        return cls(
            settings=BenchmarkSettings(**fields["settings"]),
            environment=Environment(**fields["environment"]),
            runs=[Run(**run) for run in fields["runs"]],
            mismatches=[Mismatch(**mismatch) for mismatch in fields["mismatches"]],
            skipped=fields["skipped"],
        )

    def to_markdown(self) -> str:
        """Every table, the legend, and what was left out."""
        tables = [results_table(self.rows), acceptance_table(self.acceptance)]
        if self.mismatches:
            tables.append(mismatch_table(self.mismatches))
        tables += [environment_table(self.environment), settings_table(self.settings)]
        results, *others = [table.to_markdown() for table in tables]
        return "\n".join([f"# {self.title}\n", results, LEGEND, *others, *self.notes])

    @property
    def title(self) -> str:
        """Drafter and target."""
        return f"{self.environment.drafter or 'No drafter'} for {self.environment.target}"

    @property
    def notes(self) -> list[str]:
        """What a reader must know besides the tables."""
        if not self.skipped:
            return []
        return [f"Left out, longer than the target's context: {', '.join(self.skipped)}.\n"]

    def to_rich_table(self) -> "Table":
        """The results for a terminal."""
        table = results_table(self.rows)._replace(title=self.title).to_rich()
        for row, line in zip(self.rows, table.rows, strict=True):
            line.style = "bold" if row.task == OVERALL else None
        return table

    def write(self, folder: str | Path) -> None:
        """Write report.json, report.md, acceptance.png and speedup.png."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(self.to_json() + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")
        plot_acceptance(self.acceptance, folder / "acceptance.png", self.title)
        plot_speedups(self.rows, folder / "speedup.png", self.title)
