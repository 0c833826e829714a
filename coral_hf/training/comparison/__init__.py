"""Trials compared: training runs with different settings, in tables of mean and spread.

In: a `Comparison`, `Trial`s, or many for successive halving. Out: Markdown, and `table.md`.
"""

from collections.abc import Sequence
from pathlib import Path

from pandas import DataFrame, Series
from scipy.stats import t as student

from ...atomic import write_text
from ...measure.report import Table
from .trials import Comparison, Result, Trial


def compare(comparison: Comparison, trials: list[Trial], steps: list[int], seeds: int) -> str:
    """Train each trial for each number of steps and each seed; return and write the tables."""
    with comparison.held(trials, steps):
        results = [
            [comparison.result(trial, seed, number) for seed in range(seeds) for trial in trials]
            for number in steps
        ]
        return _write_tables(comparison, results)


def search(comparison: Comparison, trials: list[Trial], steps: int, keep: int) -> str:
    """Search by successive halving with one seed; return and write the table of each rung."""
    with comparison.held(trials, [steps]):
        return _write_tables(comparison, halve(comparison, trials, steps, keep))


def halve(runs: Comparison, trials: list[Trial], steps: int, keep: int) -> list[list[Result]]:
    """Train all trials for `steps`, the better half for twice as long, and so on.

    Successive halving (Jamieson and Talwalkar 2016). Every rung trains from scratch: a learning
    rate that has decayed to its end cannot be continued.

    Args:
        keep: trials that are left at the end, at least one.

    Returns:
        the results of each rung, the best first.
    """
    rungs, left = [], list(trials)
    while True:
        results = [(runs.result(trial, 0, steps), trial) for trial in left]
        results.sort(key=lambda pair: -pair[0].cells["mean"])
        rungs.append([result for result, _ in results])
        if len(left) <= max(keep, 1):
            return rungs
        left = [trial for _, trial in results[: max(-(-len(left) // 2), keep)]]
        steps *= 2


def _write_tables(comparison: Comparison, parts: Sequence[Sequence[Result]]) -> str:
    """Write the tables of results by steps to `table.md`."""
    text = "\n".join(f"{part[0].steps} steps\n\n{comparison_table(part)}" for part in parts)
    write_text(comparison.settings.output / "table.md", text)
    return text


def comparison_table(results: Sequence[Result]) -> str:
    """Compare trials in a Markdown table; the first one is what the others are compared with.

    A cell is the mean τ over seeds ± the standard deviation. The last column is the difference of
    the mean τ to the first trial, paired by seed, with its 95 % interval by Student's t; where that
    holds 0, there is no measurable difference.
    """
    # a line for each run: trial, seed, steps, num_tokens, τ by task and temperature, mean
    runs = DataFrame([vars(result) | result.cells for result in results])
    runs = runs.drop(columns=["seconds", "losses", "acceptance", "counts"])
    by_seed = runs.pivot_table("mean", index="seed", columns="trial")
    gaps = by_seed.sub(by_seed.pop(runs.trial[0]), axis=0)
    columns = runs.columns[4:]
    rows = [
        [trial, *(_spread(own[column]) for column in columns), _difference(gaps.get(trial))]
        for trial, own in runs.groupby("trial", sort=False)
    ]
    header = ["trial", *columns, "difference (95 % interval)"]
    return Table("", header, rows, _legend(results)).to_markdown()


def _legend(results: Sequence[Result]) -> str:
    """Say how many prompts and tokens each τ of a run rests on."""
    counts: dict[str, list[list[int]]] = {}
    for result in results:
        for temperature, tasks in result.counts.items():
            for task, count in tasks.items():
                counts.setdefault(f"{task}, T={float(temperature):g}", []).append(count)
    parts = []
    for name, found in counts.items():
        tokens = " to ".join(map(str, sorted({min(found)[1], max(found)[1]})))
        parts.append(f"{name}: {found[0][0]} prompts, {tokens} tokens")
    return f"Behind the τ of each run: {'; '.join(parts)}.\n" if parts else ""


def _spread(values: Series) -> str:
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def _difference(gaps: Series | None) -> str:
    """Format the gaps to the first trial, one a seed; that trial itself and one seed have none."""
    if gaps is None or gaps.count() < 2:
        return ""
    half = student.ppf(0.975, gaps.count() - 1) * gaps.sem()
    low, high = gaps.mean() - half, gaps.mean() + half
    verdict = ", no measurable difference" if low <= 0 <= high else ""
    return f"{gaps.mean():+.3f} ({low:+.3f} to {high:+.3f}){verdict}"
