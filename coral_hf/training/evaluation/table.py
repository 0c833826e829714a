"""A table for each evaluation of a training run: acceptance by depth, beside the losses.

In: the entries that a `Trainer` logs (`state.log_history`). Out: a line for each depth.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

Entries = Sequence[Mapping[str, Any]]  # `state.log_history`
LENGTHS = {"acceptance_length": "decoded", "simulated_acceptance_length": "simulated chain"}
LOSSES = ("regression", "classification", "router")


class EvaluationTable(ProgressCallback):
    """The progress bar of `Trainer`, with a table in place of the metrics of an evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """See [`~transformers.TrainerCallback.on_log`]; an evaluation is logged before it ends."""
        if not _prefixes(logs or {}):
            super().on_log(args, state, control, logs=logs, **kwargs)

    def on_evaluate(self, args, state, control, **kwargs):
        """See [`~transformers.TrainerCallback.on_evaluate`]."""
        super().on_evaluate(args, state, control, **kwargs)
        if state.is_world_process_zero:
            console = Console()
            with console.capture() as captured:
                console.print(evaluation_table(state.log_history))
            tqdm.write(captured.get(), end="")  # above the bar


def evaluation_table(log: Entries) -> Table:
    """Tabulate the last entry of a log, an evaluation, with the last losses before it.

    A depth of the tree is trained by the step of the unroll of the same number.
    """
    found = log[-1]
    (prefix,) = _prefixes(found)
    parts = [f"{prefix}, step {found['step']}", f"loss {found[f'{prefix}_loss']:.4g}"]
    for name, means in LENGTHS.items():
        if (length := found.get(f"{prefix}_{name}")) is not None:
            parts.append(f"τ {length:.2f} ({means})")
    shares = _by_depth([found], f"{prefix}_acceptance_depth", ".1%")
    columns = {"accepted, where reached": shares}
    columns |= {f"{name} loss": _by_depth(log, f"{name}_loss", ".4g") for name in LOSSES}
    columns = {title: column for title, column in columns.items() if column}
    table = Table("depth", *columns, title="; ".join(parts), title_justify="left")
    for depth in sorted({depth for column in columns.values() for depth in column}):
        table.add_row(str(depth), *(column.get(depth, "–") for column in columns.values()))
    return table


def _prefixes(entry: Mapping[str, Any]) -> list[str]:
    """List `eval`, or `eval_chat`, `eval_code`, … of several datasets, if this is an evaluation."""
    return [match[1] for name in entry if (match := re.fullmatch(r"(eval(?:_.+?)?)_loss", name))]


def _by_depth(log: Entries, name: str, form: str) -> dict[int, str]:
    """Return the newest values of `name_1`, `name_2`, …, by number."""
    return {
        int(match[1]): format(value, form)
        for entry in log
        for key, value in entry.items()
        if (match := re.fullmatch(rf"{name}_(\d+)", key))
    }
