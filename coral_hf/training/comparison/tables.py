"""Comparisons of training runs as tables, and a plot of what longer training gains.

In: a comparison, trials. Out: Markdown, `table.md` and `scaling.png`.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from ...atomic import write_text
from ...measure import plots
from ...measure.report import Table
from .trials import Comparison, Result, Trial


def compare(
    comparison: Comparison, trials: Sequence[Trial], steps: Sequence[int], seeds: int
) -> str:
    """Train each trial for each number of steps and each seed; returns the tables.

    They are written to `table.md`, and for several numbers of steps a plot to `scaling.png`.
    """
    with comparison.held(trials, steps):
        results = [
            [comparison.result(trial, seed, number) for seed in range(seeds) for trial in trials]
            for number in steps
        ]
        if len(steps) > 1:
            plot_scaling([one for part in results for one in part], comparison.output)
        return _write_tables(comparison, results)


def search(comparison: Comparison, trials: Sequence[Trial], steps: int, keep: int) -> str:
    """Successive halving with one seed; returns the table of each rung, written to `table.md`."""
    with comparison.held(trials, [steps]):
        return _write_tables(comparison, halve(comparison, trials, steps, keep))


def halve(
    comparison: Comparison, trials: Sequence[Trial], steps: int, keep: int, seed: int = 0
) -> list[list[Result]]:
    """Train all trials for `steps`, the better half for twice as long, and so on.

    Successive halving (Jamieson and Talwalkar 2016). Every rung trains from nothing, since a
    learning rate that has fallen to its end cannot be continued.

    Args:
        keep: trials that are left at the end.

    Returns:
        the results of each rung, the best first.
    """
    if keep < 1:
        raise ValueError(f"`keep` is {keep}; keep at least 1 trial.")
    rungs, left = [], list(trials)
    while True:
        results = [(comparison.result(trial, seed, steps), trial) for trial in left]
        results.sort(key=lambda pair: -pair[0].mean_acceptance)
        rungs.append([result for result, _ in results])
        if len(left) <= keep:
            return rungs
        left = [trial for _, trial in results[: max(-(-len(left) // 2), keep)]]
        steps *= 2


def _write_tables(comparison: Comparison, parts: Sequence[Sequence[Result]]) -> str:
    """The tables of results by steps, written to `table.md`."""
    text = "\n".join(f"{part[0].steps} steps\n\n{comparison_table(part)}" for part in parts)
    write_text(comparison.output / "table.md", text)
    return text


def comparison_table(results: Sequence[Result]) -> str:
    """A table in Markdown; the first trial of `results` is what the others are compared with.

    A cell is the mean τ over seeds ± the standard deviation. The last column is the difference of
    the mean τ to the first trial, paired by seed, ± its standard error; below two standard errors
    there is no measurable difference.
    """
    columns = [(value, task) for value, tasks in results[0].acceptance.items() for task in tasks]
    rows = []
    by_trial = group_by_trial(results)
    first = next(iter(by_trial.values()))
    for name, own in by_trial.items():
        cells = [_spread([r.acceptance[value][task] for r in own]) for value, task in columns]
        mean_cell = _spread([r.mean_acceptance for r in own])
        rows.append([name, *cells, mean_cell, _difference(own, first)])
    tasks = [f"{task}, T={float(value):g}" for value, task in columns]
    return Table("", ["trial", *tasks, "mean", "difference"], rows).to_markdown()


def group_by_trial(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by the name of their trial."""
    names = dict.fromkeys(result.trial for result in results)
    return {name: [result for result in results if result.trial == name] for name in names}


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def _difference(own: Sequence[Result], first: Sequence[Result]) -> str:
    theirs = {result.seed: result.mean_acceptance for result in first}
    gaps = [r.mean_acceptance - theirs[r.seed] for r in own if r.seed in theirs]
    if own[0].trial == first[0].trial or len(gaps) < 2:
        return ""
    error = stdev(gaps) / len(gaps) ** 0.5
    verdict = "" if abs(mean(gaps)) > 2 * error else ", no measurable difference"
    return f"{mean(gaps):+.3f} ± {error:.3f}{verdict}"


def plot_scaling(results: Sequence[Result], folder: Path) -> None:
    """Draw the mean τ over the tokens that were read: a line for each trial, a dot for each run."""
    figure, (axes,) = plots.new_figure(width=6.0, height=4.0)
    lines: list[plots.Line] = []
    for name, own in group_by_trial(results).items():
        by_steps = [[r for r in own if r.steps == n] for n in sorted({r.steps for r in own})]
        tokens = [mean(r.num_tokens for r in runs) for runs in by_steps]
        values = [mean(r.mean_acceptance for r in runs) for runs in by_steps]
        colour = plots.COLOURS[len(lines) % len(plots.COLOURS)]
        lines.append(plots.Line(name, tokens, values))
        dots = [r.num_tokens for r in own], [r.mean_acceptance for r in own]
        axes.scatter(*dots, s=12, color=colour)
    plots.draw_lines(axes, lines)
    axes.set(xscale="log", xlabel="tokens read in training", ylabel="τ, tokens per target pass")
    plots.save(figure, folder / "scaling.png")
