"""Benchmark results of a drafter, for its card.

In: a report.json of `coral-hf benchmark`. Out: the parts of it that card_template.md shows.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from ..drafters.coral.modeling import CoralDrafter
from ..identity import weights_digest
from ..measure.settings import DRAFTING

METHOD = "coral"


class Results(NamedTuple):
    """The parts of a report that a card shows."""

    rows: list[dict[str, Any]]  # of the drafter, by benchmark, overall last
    depths: list[dict[str, Any]]  # of the drafter
    environment: dict[str, Any]
    settings: dict[str, Any]
    num_skipped: int  # prompts


def read_results(path: str | Path) -> Results:
    """Read a report.json.

    Raises:
        ValueError: if it is no report of `coral-hf benchmark`, or measured no drafter.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        settings = report["settings"]
        # what the call chose; the rest are the drafter's own settings
        drafting = {name: settings[name] for name in DRAFTING if settings.get(name) is not None}
        results = Results(
            rows=[row for row in report["rows"] if row["method"] == METHOD],
            depths=[depth for depth in report["acceptance"] if depth["method"] == METHOD],
            environment=report["environment"],
            settings=settings | {"drafting": drafting},
            num_skipped=len(report["skipped"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as a report of `coral-hf benchmark` ({error!r}). Pass the"
            " report.json of its --output."
        ) from error
    if not results.rows:
        raise ValueError(
            f"{path} measured no drafter: the method {METHOD!r} is not in it. Run `coral-hf"
            " benchmark --method plain --method coral`."
        )
    return results


def check_results(results: Results, drafter: CoralDrafter, targets: Sequence[str | None]) -> None:
    """Check that a report is of this drafter.

    Args:
        targets: names that the drafter's target goes by, ids and folders.

    Raises:
        ValueError: if other weights were measured, or another target.
    """
    environment = results.environment
    found, own = environment["drafter_digest"], weights_digest(drafter)
    # the digest rounds to bf16; float16 rounds differently before that
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
