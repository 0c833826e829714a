"""Plots of a training run, and a table for each of its evaluations.

In: the entries that a `Trainer` logs (`state.log_history`), or a saved `trainer_state.json`. Out:
PNG files: losses and similarity by step of the unroll, acceptance; on the terminal a line for each
depth, acceptance beside the losses.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ...measure.report import COLOURS, Line, draw_lines, line_figure, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Entries = Sequence[Mapping[str, Any]]  # `state.log_history`
Curve = tuple[list[int], list[float]]  # steps of the optimizer, values

OPTIMIZER_STEP = "step of the optimizer"
# metric → its name, and the style of its line
LENGTHS = {
    "acceptance_length": ("decoded", "o-"),
    "simulated_acceptance_length": ("simulated chain", "o:"),
}
LENGTH_LABELS = {"xlabel": OPTIMIZER_STEP, "ylabel": "acceptance length τ, tokens per pass"}
LOSSES = ("regression", "classification", "router")


class PlotCallback(TrainerCallback):
    """Plots a run into its `output_dir` at each evaluation and at its end."""

    def on_evaluate(self, args, state, control, **kwargs):
        """See [`~transformers.TrainerCallback.on_evaluate`]."""
        if not state.is_world_process_zero:
            return
        for name, figure in figures(state.log_history).items():
            path = Path(args.output_dir) / f"{name}.png"
            try:
                save_figure(figure, path)
            except OSError as error:  # a training run is worth more than its plot
                logger.warning("The plot %s could not be written (%s).", path, error)

    on_train_end = on_evaluate


def figures(log: Entries) -> dict[str, "Figure"]:
    """Draw all plots that a log has entries for, by file name."""
    found = {}
    losses = {name: _step_lines(log, f"{name}_loss") for name in LOSSES}
    if drawn := {name: lines for name, lines in losses.items() if lines}:
        found["losses"], panels = new_figure(len(drawn))
        for axes, (name, lines) in zip(panels, drawn.items(), strict=True):
            draw_lines(axes, lines)
            axes.set(xlabel=OPTIMIZER_STEP, ylabel=f"{name} loss per trained token")
    if similarity := _step_lines(log, "feature_similarity"):
        labels = {"xlabel": OPTIMIZER_STEP, "ylabel": "cosine with the prediction of step 1"}
        found["feature_similarity"] = line_figure(similarity, **labels)
    if lengths := _length_lines(log):
        found["acceptance_length"] = line_figure(lengths, **LENGTH_LABELS)
    if prefixes := eval_prefixes(log, "acceptance_depth_1"):
        found["acceptance_by_depth"] = _depth_figure(log, prefixes)
    return found


def curve(log: Entries, name: str) -> Curve:
    """Collect the steps of the optimizer at which a metric was logged, and its values."""
    entries = [entry for entry in log if name in entry]
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]


def curves_by_step(log: Entries, name: str) -> dict[int, Curve]:
    """Collect the curves of `name_1`, `name_2`, … by step of the unroll."""
    found = {int(match[1]) for match in _matches(log, rf"{name}_(\d+)")}
    return {step: curve(log, f"{name}_{step}") for step in sorted(found)}


def eval_prefixes(log: Entries, metric: str) -> list[str]:
    """List the prefixes of a metric: `eval`, or `eval_chat`, `eval_code`, … of several datasets."""
    return [match[1] for match in _matches(log, rf"(eval(?:_.+?)?)_{metric}")]


def _matches(log: Entries, pattern: str) -> Iterator[re.Match]:
    """Match all names in a log as a whole, each once."""
    names = dict.fromkeys(name for entry in log for name in entry)
    return (match for name in names if (match := re.fullmatch(pattern, name)))


def _step_lines(log: Entries, name: str) -> list[Line]:
    """Draw a line for each step of the unroll, or one for all steps together."""
    curves, together = curves_by_step(log, name), curve(log, name)
    if not curves and together[0]:
        return [Line("all steps", *together, "-", COLOURS[-1])]
    return [
        Line(f"step {step}", *values, "-", COLOURS[(step - 1) % len(COLOURS)])
        for step, values in curves.items()
    ]


def _length_lines(log: Entries) -> list[Line]:
    """Draw the decoded and simulated acceptance length of each evaluated dataset."""
    return [
        Line(f"{prefix}, {means}", *values, style, COLOURS[index % len(COLOURS)])
        for index, prefix in enumerate(eval_prefixes(log, "simulated_acceptance_length"))
        for name, (means, style) in LENGTHS.items()
        if (values := curve(log, f"{prefix}_{name}"))[0]
    ]


def _depth_figure(log: Entries, prefixes: Sequence[str]) -> "Figure":
    """Draw a panel for each dataset, a line for each evaluation, the later the darker."""
    figure, panels = new_figure(len(prefixes))
    for axes, prefix in zip(panels, prefixes, strict=True):
        name = f"{prefix}_acceptance_depth"
        entries = [entry for entry in log if f"{name}_1" in entry]
        lines = []
        for number, entry in enumerate(entries, start=1):
            shares = {depth: ys[0] for depth, (_, ys) in curves_by_step([entry], name).items()}
            # the first and the last one in the legend imply the rest
            label = f"step {entry['step']}" if number in (1, len(entries)) else ""
            # the last two digits are the opacity
            shade = f"{COLOURS[1]}{255 * number // len(entries):02x}"
            lines.append(Line(label, [*shares], [*shares.values()], "o-", shade))
        draw_lines(axes, lines)
        axes.set(xlabel=f"depth in the tree ({prefix})", ylim=(0, 1.05))
        axes.set_ylabel("accepted, of rounds that reached it")
        axes.locator_params("x", integer=True)
    return figure


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
    shares = _by_depth([found], f"{prefix}_acceptance_depth", ".1%")
    columns = {"accepted, where reached": shares}
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
