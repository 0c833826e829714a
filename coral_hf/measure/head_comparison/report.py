"""What draft heads came to: a table for each temperature, and a heat map of a sweep.

In: the runs of each trial. Out: JSON, Markdown, PNG. Every number is computed from the runs.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...heads.groups import Groups
from ..environment import Environment
from ..runs import Run
from ..summary import OVERALL, Row, summarise
from ..tables import TextTable, environment_table
from .plots import Cells, plot_sweep

FULL = "full"


@dataclass(frozen=True)
class HeadReport:
    """The result of a `HeadComparison`."""

    trials: dict[str, dict[str, Any]]  # name → the config of its drafter
    runs: dict[str, list[Run]]  # temperature → runs of all trials, whose methods are their names
    environment: Environment

    def rows(self, temperature: str) -> dict[tuple[str, str], Row]:
        """(trial, task) → its numbers."""
        return {(row.method, row.task): row for row in summarise(self.runs[temperature])}

    def table(self, temperature: str) -> TextTable:
        """A line a trial; τ by task with its share of the whole head's."""
        rows = self.rows(temperature)
        tasks = list(dict.fromkeys(task for _, task in rows))
        header = (
            "head",
            "read",
            *(f"τ, {task}" for task in tasks),
            "draft, ms a round",
            "of full",
            "speed-up",
            "decoding alone",
            "exact match",
        )
        lines = [self._line(rows, name, tasks) for name in self.trials]
        return TextTable(f"T = {float(temperature):g}", header, lines)

    def _line(self, rows: dict[tuple[str, str], Row], name: str, tasks: list[str]) -> tuple:
        own, full = rows[name, OVERALL], rows[FULL, OVERALL]
        draft, whole = (row.stage_milliseconds["draft"] for row in (own, full))
        return (
            name,
            f"{read_share(self.trials[name]):.1%}",
            *(
                _share(rows[name, task].tau_per_token, rows[FULL, task].tau_per_token)
                for task in tasks
            ),
            f"{draft:.2f}",
            f"{draft / whole:.0%}",
            f"{own.speedup:.2f}×",
            "" if own.decoding_speedup is None else f"{own.decoding_speedup:.2f}×",
            "" if own.exact_match is None else f"{own.exact_match:.1%}",
        )

    def to_markdown(self) -> str:
        """All tables, and the environment."""
        tables = [self.table(temperature) for temperature in self.runs]
        return "\n".join(t.to_markdown() for t in [*tables, environment_table(self.environment)])

    def to_json(self) -> str:
        """All fields."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "HeadReport":
        """Read back what `to_json` wrote."""
        fields = json.loads(text)
        return cls(
            trials=fields["trials"],
            runs={value: [Run(**run) for run in runs] for value, runs in fields["runs"].items()},
            environment=Environment(**fields["environment"]),
        )

    def write(self, folder: Path) -> None:
        """Write report.json, report.md and, of several numbers of groups, a picture of each T."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(self.to_json() + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")
        for temperature in self.runs:
            for family, cells in self.sweeps(temperature).items():
                if len({groups for groups, _ in cells}) > 1:
                    plot_sweep(cells, folder / f"sweep-{family}-{float(temperature):g}.png")

    def sweeps(self, temperature: str) -> Mapping[str, Cells]:
        """Routed trials by grouping and routing, of which each makes a picture."""
        rows = self.rows(temperature)
        found: dict[str, dict] = {}
        for name, config in self.trials.items():
            if config["draft_head"] == "routed":
                family = found.setdefault(f"{config['grouping']}-{config['routing']}", {})
                number = config["num_groups"]
                family[number, config["num_active_groups"] / number] = (
                    _ratio(rows, name, lambda row: row.tau_per_token),
                    _ratio(rows, name, lambda row: row.stage_milliseconds["draft"]),
                )
        return found


def read_share(config: dict[str, Any]) -> float:
    """The bytes that a level of one row reads, of those of the whole head.

    What a head adds counts too: the router's weights, the low-rank head's `down`.
    """
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    if config["draft_head"] == "frequency":
        return config["num_hot_tokens"] / vocab
    if config["draft_head"] == "low_rank":
        return config["head_rank"] * (vocab + hidden) / (vocab * hidden)
    if config["draft_head"] == "routed":
        groups = Groups(vocab, config["num_groups"])
        read = min(config["num_active_groups"] * groups.size, vocab)
        return (read + hidden + groups.num_groups) / vocab
    return 1.0


def _share(own: float | None, full: float | None) -> str:
    if own is None or full is None:
        return ""
    return f"{own:.3f} ({own / full:.1%})"


def _ratio(rows: dict[tuple[str, str], Row], name: str, value: Callable[[Row], Any]) -> float:
    return value(rows[name, OVERALL]) / value(rows[FULL, OVERALL])
