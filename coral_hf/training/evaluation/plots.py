"""The pictures of a training run: losses and similarity by step of the unroll, acceptance.

In: the entries that a `Trainer` logs (`state.log_history`), or a saved `trainer_state.json`. Out:
PNG files, and figures in TensorBoard. matplotlib is imported when a picture is drawn, and needs no
display.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Entries = Sequence[Mapping[str, Any]]  # `state.log_history`
Curve = tuple[list[int], list[float]]  # steps of the optimizer, values
Line = tuple[str, Curve, str, str]  # label, curve, style, colour

STATE = "trainer_state.json"
# of the Okabe-Ito palette, told apart by colour-blind readers and in grey
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
# metric → what it is called, and its line
LENGTHS = {
    "acceptance_length": ("decoded", "o-"),
    "simulated_acceptance_length": ("simulated chain", "o:"),
}


class PlotCallback(TrainerCallback):
    """Draws a run into its `output_dir` at each evaluation and at its end.

    Args:
        handler: of the trainer; a TensorBoard callback in it gets the figures of evaluations.
    """

    def __init__(self, handler):
        self._handler = handler

    def on_evaluate(self, args, state, control, **kwargs):
        """See [`~transformers.TrainerCallback.on_evaluate`]."""
        self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        """See [`~transformers.TrainerCallback.on_train_end`]."""
        self._draw(args, state)

    def _draw(self, args, state) -> None:
        if not state.is_world_process_zero:
            return
        for name, figure in figures(state.log_history).items():
            _save_if_possible(figure, Path(args.output_dir) / f"{name}.png")
            for callback in self._handler.callbacks:
                # its writer is closed when training has ended
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                    callback.tb_writer.add_figure(name, figure, state.global_step)


def plot_run(state: str | Path, folder: str | Path | None = None) -> list[Path]:
    """Draw a run again from what was saved of it.

    Args:
        state: a `trainer_state.json`, or a checkpoint that holds one.
        folder: where the PNG files go; beside the state by default.

    Returns:
        the files that were written.
    """
    file = _state_file(state)
    folder = file.parent if folder is None else Path(folder)
    return [
        save(figure, folder / f"{name}.png") for name, figure in figures(read_log(file)).items()
    ]


def compare_runs(states: Mapping[str, str | Path], path: str | Path) -> Path:
    """Draw the acceptance lengths of several runs into one PNG file.

    Args:
        states: the `trainer_state.json` or the checkpoint of each run, by the run's name.
        path: the file to write.
    """
    lines = [
        (f"{name}, {label}", values, style, COLOURS[index % len(COLOURS)])
        for index, (name, state) in enumerate(states.items())
        for label, values, style, _ in _length_curves(read_log(_state_file(state)))
    ]
    if not lines:
        raise ValueError(
            f"None of the runs {[*states]} has logged an acceptance length; train with an"
            " `eval_dataset` and `eval_strategy`."
        )
    return save(_lengths_figure(lines), Path(path))


def _state_file(state: str | Path) -> Path:
    file = Path(state) / STATE if Path(state).is_dir() else Path(state)
    if not file.is_file():
        raise ValueError(f"{file} is not there; give a checkpoint, or its {STATE}.")
    return file


def read_log(state: Path) -> Entries:
    """What a `trainer_state.json` says was logged."""
    return json.loads(state.read_text())["log_history"]


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure; its folder may be missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _save_if_possible(figure: "Figure", path: Path) -> None:
    """Write a figure, or warn: a training is worth more than its picture."""
    try:
        save(figure, path)
    except OSError as error:
        logger.warning("The picture %s could not be written (%s); training goes on.", path, error)


def figures(log: Entries) -> dict[str, "Figure"]:
    """All pictures that a log has entries for, by file name."""
    draw: dict[str, Callable[[Entries], Figure | None]] = {
        "losses": _losses,
        "feature_similarity": _similarity,
        "acceptance_length": _acceptance_length,
        "acceptance_by_depth": _acceptance_by_depth,
    }
    drawn = {name: function(log) for name, function in draw.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def curve(log: Entries, name: str) -> Curve:
    """The values of a metric, and the steps of the optimizer they were logged at."""
    entries = [entry for entry in log if name in entry]
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]


def curves_by_step(log: Entries, name: str) -> dict[int, Curve]:
    """The curves of `name_1`, `name_2`, … by step of the unroll."""
    pattern = re.compile(rf"{name}_(\d+)")
    steps = {int(match[1]) for entry in log for key in entry if (match := pattern.fullmatch(key))}
    return {step: curve(log, f"{name}_{step}") for step in sorted(steps)}


def eval_prefixes(log: Entries, metric: str) -> list[str]:
    """`eval`, or `eval_chat`, `eval_code`, … of several datasets, that have a metric."""
    pattern = re.compile(rf"(eval(?:_.+?)?)_{metric}")
    names = dict.fromkeys(key for entry in log for key in entry)
    return [match[1] for key in names if (match := pattern.fullmatch(key))]


def _losses(log: Entries) -> "Figure | None":
    names = {"regression_loss": "regression", "classification_loss": "classification"}
    found = {label: curves_by_step(log, name) for name, label in names.items()}
    found = {label: curves for label, curves in found.items() if curves}
    router = curve(log, "router_loss")
    if router[0]:
        found["router"] = {0: router}
    if not found:
        return None
    figure, panels = _panels(len(found))
    for axes, (label, curves) in zip(panels, found.items(), strict=True):
        _draw_steps(axes, curves)
        axes.set(xlabel="step of the optimizer", ylabel=f"{label} loss a trained token")
    return figure


def _similarity(log: Entries) -> "Figure | None":
    curves = curves_by_step(log, "feature_similarity")
    if not curves:
        return None
    figure, (axes,) = _panels(1)
    _draw_steps(axes, curves)
    axes.set(xlabel="step of the optimizer", ylabel="cosine with the prediction of step 1")
    return figure


def _draw_steps(axes: "Axes", curves: Mapping[int, Curve]) -> None:
    """A curve of each step of the unroll; 0 stands for all steps together."""
    for step, (x, y) in curves.items():
        colour = COLOURS[(step - 1) % len(COLOURS)]
        label = f"step {step}" if step else "all steps"
        # a curve of one point would not be seen
        axes.plot(x, y, "." if len(x) == 1 else "-", color=colour, linewidth=1.2, label=label)
    _add_legend(axes)


def _acceptance_length(log: Entries) -> "Figure | None":
    lines = _length_curves(log)
    return _lengths_figure(lines) if lines else None


def _length_curves(log: Entries) -> list[Line]:
    """Decoded and simulated, of each evaluated dataset."""
    prefixes = eval_prefixes(log, "simulated_acceptance_length")
    return [
        (f"{prefix}, {means}", values, style, colour)
        for prefix, colour in zip(prefixes, COLOURS * len(prefixes), strict=False)
        for name, (means, style) in LENGTHS.items()
        if (values := curve(log, f"{prefix}_{name}"))[0]
    ]


def _lengths_figure(lines: Sequence[Line]) -> "Figure":
    figure, (axes,) = _panels(1)
    for label, (x, y), style, colour in lines:
        axes.plot(x, y, style, color=colour, markersize=3, linewidth=1.2, label=label)
    axes.set(xlabel="step of the optimizer", ylabel="acceptance length τ, tokens a pass")
    _add_legend(axes)
    return figure


def _acceptance_by_depth(log: Entries) -> "Figure | None":
    """Of each dataset a panel, of each evaluation a line, the later the darker."""
    from matplotlib.ticker import MaxNLocator

    prefixes = eval_prefixes(log, "acceptance_depth_1")
    if not prefixes:
        return None
    figure, panels = _panels(len(prefixes))
    for axes, prefix in zip(panels, prefixes, strict=True):
        entries = [entry for entry in log if f"{prefix}_acceptance_depth_1" in entry]
        for index, entry in enumerate(entries):
            depths = dict(_depths(entry, prefix))
            share = (index + 1) / len(entries)
            # a legend of the first and the last one tells the rest
            label = f"step {entry['step']}" if index in (0, len(entries) - 1) else None
            axes.plot(
                [*depths], [*depths.values()], "o-", color=COLOURS[1], alpha=share, label=label
            )
        axes.set(
            xlabel=f"depth in the tree ({prefix})", ylabel="accepted, of rounds that came here"
        )
        axes.set_ylim(0, 1.05)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _add_legend(axes)
    return figure


def _depths(entry: Mapping[str, Any], prefix: str) -> Iterator[tuple[int, float]]:
    for name, share in entry.items():
        if match := re.fullmatch(rf"{prefix}_acceptance_depth_(\d+)", name):
            yield int(match[1]), share


def _panels(number: int) -> tuple["Figure", list["Axes"]]:
    """A figure with panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * number, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, number, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
        axes.set_axisbelow(True)
    return figure, panels


def _add_legend(axes: "Axes") -> None:
    """Below the axes, where it hides no curve."""
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
