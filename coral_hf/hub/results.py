"""What a benchmark's report says of a drafter, for its card.

In: a report.json of `coral-hf benchmark`. Out: Markdown: tau and speed-up by benchmark, acceptance
by depth, and what was measured where.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from ..drafters.coral.modeling import CoralDrafter
from ..identity import weights_digest
from .sections import table

METHOD = "coral"
PARTS = ("rows", "acceptance", "environment", "settings", "mismatches", "skipped")


class Results(NamedTuple):
    """The parts of a report that a card shows."""

    rows: list[dict[str, Any]]  # of the drafter, by benchmark, overall last
    depths: list[dict[str, Any]]  # of the drafter
    environment: dict[str, Any]
    settings: dict[str, Any]
    num_skipped: int

    def to_markdown(self) -> str:
        """A heading, the tables, and what is needed to measure the same again."""
        parts = [
            f"### {self.title}",
            _grid(BENCHMARKS, [[show(row) for show in BENCHMARKS.values()] for row in self.rows]),
            TAU,
            self._by_depth(),
            table(self._conditions()),
        ]
        return "\n\n".join(parts) + "\n"

    def _by_depth(self) -> str:
        cells = [[show(depth) for show in DEPTHS.values()] for depth in self.depths]
        return _grid(DEPTHS, cells) if cells else "No guess was accepted, at any depth."

    @property
    def title(self) -> str:
        """Hardware, dtype and how tokens were chosen."""
        environment, settings = self.environment, self.settings
        how = f"sampling at temperature {settings['temperature']}"
        how = how if settings["do_sample"] else "greedy"
        return f"{environment['hardware']}, {environment['dtype']}, {how}"

    def _conditions(self) -> list[tuple[str, object]]:
        found, settings = self.environment, self.settings
        padded = found["num_padded_layers"]
        depth = f", {padded} of its {found['num_target_layers']} layers add nothing (padded)"
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        threads = f"{found['num_cores']} cores, {found['num_threads']} torch threads"
        return [
            ("hardware", f"{found['hardware']}, {threads}"),
            ("device, dtype", f"`{found['device']}`, `{found['dtype']}`"),
            ("target", f"`{found['target']}`{depth if padded else ''}"),
            ("versions", versions),
            ("new tokens, repeats", f"{settings['max_new_tokens']}, {settings['repeats']}"),
            ("speculation", f"`{settings['speculation']}`"),
            ("settings of the call", settings["tree"] or "the drafter's own"),
            ("prompts too long for the target", self.num_skipped),
            ("command", f"`{found['command']}`"),
        ]


TAU = """\
tau: tokens for each target pass after the first. Speed-up: seconds per token of plain `generate`
over those with the drafter, the prompt included, the median over answers."""


def _number(name: str, form: str = "{:.2f}"):
    """A cell of a row by its name, a dash where nothing was measured."""
    return lambda row: "–" if row[name] is None else form.format(row[name])


BENCHMARKS = {
    "benchmark": _number("task", "{}"),
    "answers": _number("num_items", "{}"),
    "tau": _number("tau_per_token"),
    "speed-up": _number("speedup", "{:.2f}x"),
    "speed-up without the prompt": _number("decoding_speedup", "{:.2f}x"),
    "tokens/s": _number("tokens_per_second", "{:.1f}"),
    "answers equal to the target's": _number("exact_match", "{:.1%}"),
}
DEPTHS = {
    "depth": _number("depth", "{}"),
    "accepted, of all rounds": _number("share", "{:.1%}"),
    "accepted, where the parent was": _number("share_given_parent", "{:.1%}"),
}


def _grid(header: dict, rows: list[list[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_results(path: str | Path) -> Results:
    """Read a report.json.

    Raises:
        ValueError: if it is no report of `coral-hf benchmark`, or measured no drafter.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [part for part in PARTS if part not in report]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"The report {path} cannot be read: {error}.") from error
    if missing:
        raise ValueError(
            f"{path} is no report of `coral-hf benchmark`: it has no {', '.join(missing)}. Pass the"
            " report.json of its --output."
        )
    rows = [row for row in report["rows"] if row["method"] == METHOD]
    if not rows:
        raise ValueError(
            f"{path} measured no drafter: the method {METHOD!r} is not in it. Run `coral-hf"
            " benchmark --method plain --method coral`."
        )
    return Results(
        rows=rows,
        depths=[depth for depth in report["acceptance"] if depth["method"] == METHOD],
        environment=report["environment"],
        settings=report["settings"],
        num_skipped=len(report["skipped"]),
    )


def check_results(results: Results, drafter: CoralDrafter, targets: Sequence[str | None]) -> None:
    """Raise a ValueError if a report is not of this drafter.

    Args:
        targets: names that the drafter's target goes by, ids and folders.
    """
    environment = results.environment
    found, own = environment["drafter_digest"], weights_digest(drafter)
    # the digest rounds to bf16, and float16 rounds otherwise before it
    if found not in (own, weights_digest(deepcopy(drafter).half())):
        raise ValueError(
            f"The report measured a drafter with other weights ({environment['drafter']},"
            f" {found[:8]}), this one's are {own[:8]}; measure this one."
        )
    names = {Path(target).name for target in targets if target is not None}
    if names and Path(environment["target"]).name not in names:
        raise ValueError(
            f"The report was measured on the target {environment['target']}, and the drafter is"
            f" for {' or '.join(sorted(names))}; measure it on its own target."
        )
