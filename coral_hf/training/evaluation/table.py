"""A table for each evaluation of a training run: acceptance by depth beside the losses.

In: the entries that a `Trainer` logs (`state.log_history`). Out: a line for each depth, on the
terminal.
"""

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

from .curves import LENGTHS, LOSSES, Entries, curves_by_step, eval_prefixes
from .routing import NAMES as ROUTING


class EvaluationTable(ProgressCallback):
    """The progress bar of `Trainer`, with a table in place of the metrics of an evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """See [`~transformers.TrainerCallback.on_log`]; an evaluation is logged before it ends."""
        if not eval_prefixes([logs or {}], "loss"):
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
    (prefix,) = eval_prefixes([found], "loss")
    parts = [f"{prefix}, step {found['step']}", f"loss {found[f'{prefix}_loss']:.4g}"]
    for name, (means, _) in LENGTHS.items():
        if (length := found.get(f"{prefix}_{name}")) is not None:
            parts.append(f"τ {length:.2f} ({means})")
    shares = {"accepted, where reached": "acceptance"}
    shares |= {name.replace("_", " "): name for name in ROUTING}
    columns = {
        title: _by_depth([found], f"{prefix}_{name}_depth", ".1%") for title, name in shares.items()
    }
    columns |= {f"{name} loss": _by_depth(log, f"{name}_loss", ".4g") for name in LOSSES}
    columns = {title: column for title, column in columns.items() if column}
    table = Table("depth", *columns, title="; ".join(parts), title_justify="left")
    for depth in sorted({depth for column in columns.values() for depth in column}):
        table.add_row(str(depth), *(column.get(depth, "–") for column in columns.values()))
    return table


def _by_depth(log: Entries, name: str, form: str) -> dict[int, str]:
    """Return the newest values of `name_1`, `name_2`, …, by number."""
    curves = curves_by_step(log, name)
    return {depth: format(values[-1], form) for depth, (_, values) in curves.items()}
