"""A comparison as files: a table, and a picture of what longer trainings gain."""

from collections.abc import Sequence

from .halving import halve
from .plots import plot_scaling
from .run import Comparison
from .table import comparison_table
from .trial import Trial


def compare(
    comparison: Comparison, trials: Sequence[Trial], steps: Sequence[int], seeds: int
) -> str:
    """Train each trial for each number of steps and each seed; returns the tables.

    They are written to `table.md`, and of several numbers of steps a picture to `scaling.png`.
    """
    with comparison.held(trials, steps):
        results = [
            [comparison.result(trial, seed, number) for seed in range(seeds) for trial in trials]
            for number in steps
        ]
        if len(steps) > 1:
            picture = comparison.output / "scaling.png"
            plot_scaling([one for part in results for one in part], picture)
        return _written(
            comparison, [f"{part[0].steps} steps\n\n{comparison_table(part)}" for part in results]
        )


def search(comparison: Comparison, trials: Sequence[Trial], steps: int, keep: int) -> str:
    """Successive halving with one seed; returns the table of each rung, written to `table.md`."""
    with comparison.held(trials, [steps]):
        rungs = halve(comparison, trials, steps, keep)
        tables = [f"{rung.steps} steps\n\n{comparison_table(rung.results)}" for rung in rungs]
        return _written(comparison, tables)


def _written(comparison: Comparison, tables: Sequence[str]) -> str:
    text = "\n".join(tables)
    (comparison.output / "table.md").write_text(text, encoding="utf-8")
    return text
