"""Results as a table: mean and spread over seeds, and what differs from the first trial."""

from collections.abc import Sequence
from statistics import mean, stdev

from .results import Result


def comparison_table(results: Sequence[Result]) -> str:
    """A table in Markdown; the first trial of `results` is what the others are compared with.

    A cell is the mean τ over seeds ± the standard deviation. The last column is the difference of
    the mean τ to the first trial, paired by seed, ± its standard error; below two standard errors
    there is no measurable difference.
    """
    trials = list(dict.fromkeys(result.trial for result in results))
    by_trial = {name: [r for r in results if r.trial == name] for name in trials}
    columns = [(value, task) for value, tasks in results[0].acceptance.items() for task in tasks]
    head = [
        "trial",
        *(f"{task}, T={float(value):g}" for value, task in columns),
        "mean",
        "difference",
    ]
    lines = [head, ["---"] * len(head)]
    for name, own in by_trial.items():
        cells = [_spread([r.acceptance[value][task] for r in own]) for value, task in columns]
        cells.append(_spread([r.mean_acceptance for r in own]))
        lines.append([name, *cells, _difference(own, by_trial[trials[0]])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def _difference(own: Sequence[Result], first: Sequence[Result]) -> str:
    theirs = {result.seed: result.mean_acceptance for result in first}
    pairs = [(r.mean_acceptance, theirs[r.seed]) for r in own if r.seed in theirs]
    gaps = [ours - other for ours, other in pairs]
    if own[0].trial == first[0].trial or len(gaps) < 2:
        return ""
    error = stdev(gaps) / len(gaps) ** 0.5
    verdict = "" if abs(mean(gaps)) > 2 * error else ", no measurable difference"
    return f"{mean(gaps):+.3f} ± {error:.3f}{verdict}"
