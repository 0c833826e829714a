"""Make draft heads for one drafter and measure them in turn, beside the full head.

    python examples/compare_heads.py --target org/my-llama --drafter my-drafter --output heads \\
        --dataset train.jsonl --prompts mt_bench.jsonl \\
        --trial "routed grouping=kmeans num_groups=64 num_active_groups=8"

Each head is made once for an output folder, all are measured on the same prompts: a table for each
temperature, and heat maps over the number of groups and the share that is read. With --beside
another drafter of the target is measured in turn with them. Every other option is one of
CoralTrainingArguments, for the heads that are trained.
"""

import copy
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pandas import DataFrame

from coral_hf.atomic import new_folder, sole_writer
from coral_hf.cli.options import DatasetOptions, MeasuredOptions, load_drafter
from coral_hf.cli.parser import parse
from coral_hf.drafters.coral import CoralConfig
from coral_hf.drafters.model import Drafter
from coral_hf.heads.router import Groups
from coral_hf.identity import weights_digest
from coral_hf.measure.benchmark import COLUMNS, measure_prompts
from coral_hf.measure.calls import Bench, Call, sampling_arguments
from coral_hf.measure.report import Report, Table, dashed, describe_environment, new_figure
from coral_hf.measure.settings import ComparisonSettings, option
from coral_hf.measure.summary import OVERALL, Row, summarise_tasks
from coral_hf.target import read_target
from coral_hf.training.comparison.trials import Comparison, config_fields
from coral_hf.training.grouping import most_frequent_first, token_counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
FULL = "full"  # the head that the others are compared with

# the fields of `CoralConfig` that a head is made with, and those that a routed one is read with
MADE_WITH = {
    FULL: (),
    "quantized": (),
    "routed": ("grouping", "num_groups"),
    "frequency": ("num_hot_tokens",),
}
READ_WITH = ("num_active_groups", "routing", "active_mass")
READ_ALONE = {name: getattr(CoralConfig, name) for name in READ_WITH[1:]}  # unless a trial says


@dataclass(kw_only=True)
class CompareHeadsOptions(MeasuredOptions, DatasetOptions):
    """Which heads are compared."""

    trial: list[str] = option("'routed grouping=kmeans num_groups=16 num_active_groups=2'.")
    beside: list[str] = option("Another drafter of the target, measured as it is.", [])


@dataclass(kw_only=True)
class HeadComparisonSettings(ComparisonSettings):
    """How draft heads of one drafter are compared."""

    repeats: int = option("Timed calls of each head on each prompt.", 1, least=1)
    seed: int = option("Seed of sampling.", 0)


class HeadTrial(NamedTuple):
    """`routed grouping=kmeans num_groups=32 num_active_groups=4`: a head, fields of its config."""

    name: str  # as it was typed
    head: str
    fields: dict[str, Any]  # of `CoralConfig`

    @classmethod
    def parse(cls, text: str) -> "HeadTrial":
        """Read a head's name and settings.

        Raises:
            ValueError: for an unknown head, and settings that are missing, of another head, or not
                of their type.
        """
        head, *words = text.split() or [""]
        fields = config_fields(words)
        needed = {*MADE_WITH.get(head, ())}
        allowed = needed | {*(READ_WITH if head.startswith("routed") else ())}
        if head not in MADE_WITH or not needed <= fields.keys() <= allowed:
            raise ValueError(
                f"A trial is {text!r}; write a head with what it is made with as name=value, of"
                f" {MADE_WITH}; routed ones also take {READ_WITH}."
            )
        return cls(" ".join([head, *words]), head, fields)

    @property
    def key(self) -> str:
        """The name of the head's folder, which trials share if they only read it differently."""
        made = self.head.removesuffix("_quantized")
        return "-".join([made, *(str(self.fields[name]) for name in MADE_WITH[self.head])])


@dataclass
class HeadComparison(Comparison):
    """Makes the heads of trials, each once for an output folder, and measures them."""

    settings: HeadComparisonSettings
    drafter: Drafter
    beside: Mapping[str, Drafter] = field(default_factory=dict)  # measured as they are, by name

    def report(self, trials: Sequence[HeadTrial]) -> Report:
        """Measure trials, and the full head beside them.

        Raises:
            ValueError: if another comparison holds the folder, or its heads were made otherwise.
        """
        settings, trials = self.settings, [HeadTrial.parse(FULL), *trials]
        with sole_writer(settings.output):
            self.keep_folder(drafter=weights_digest(self.drafter), options=settings.options)
            heads = {trial.name: self.drafter_for(trial) for trial in trials} | {**self.beside}
        configs = {name: drafter.config.to_dict() for name, drafter in heads.items()}
        calls: list[Call] = []
        tables: list[Table] = []
        figures: dict[str, Callable] = {}
        for temperature in settings.temperatures:
            common = sampling_arguments(temperature, settings.max_new_tokens)
            drafting = common | {"speculation": "always", **settings.drafting()}
            methods = {name: drafting | {"assistant_model": own} for name, own in heads.items()}
            methods["plain"] = common
            bench = Bench(self.target, methods, settings.repeats, warmup=1, seed=settings.seed)
            measured, *_ = measure_prompts(bench, self.tokenizer, self.prompts)
            rows = {(row.method, row.task): row for row in summarise_tasks(measured)}
            calls += measured
            title, size = f"T = {temperature:g}", self.target.dtype.itemsize
            tables.append(head_table(title, rows, configs, size))
            for family, maps in heat_maps(rows, configs).items():
                figures[f"sweep-{family}-{temperature:g}"] = partial(draw_heat_maps, maps)
        environment = describe_environment(self.target, self.drafter)
        return Report(settings, environment, calls, {"trials": configs}, tables, figures)

    def drafter_for(self, trial: HeadTrial) -> Drafter:
        """Return the drafter that reads a trial's head, in the target's dtype."""
        folder = self.settings.output / "heads" / trial.key
        if not folder.exists():
            logger.info("making %s", trial.key)
            with new_folder(folder) as aside:
                self._make(trial).save_pretrained(aside)
        drafter = type(self.drafter).from_pretrained(folder, dtype=self.target.dtype).eval()
        drafter.heads.configure(**{**READ_ALONE, "draft_head": trial.head, **trial.fields})
        return drafter.to(self.drafter.device)

    def _make(self, trial: HeadTrial) -> Drafter:
        """Copy the drafter and give it a trial's head, trained or counted."""
        drafter = copy.deepcopy(self.drafter).float()
        drafter.heads.remove_router()
        if trial.head == "routed":
            names = trial.fields.keys() & {*MADE_WITH[trial.head], "num_active_groups"}
            settings = {name: trial.fields[name] for name in names}
            self.train(drafter, stage="router", **settings)
        elif trial.head == "frequency":
            drafter.heads.configure(**trial.fields)  # raises beyond the vocabulary
            tokens = most_frequent_first(token_counts(read_target(self.target), self.dataset))
            drafter.heads.add_frequency_head(tokens[: trial.fields["num_hot_tokens"]])
        return drafter


READABLE = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none"}  # text on any colour
Rows = dict[tuple[str, str], Row]  # (trial, task) → its numbers at one temperature
MAPS = ("τ, relative to the full head", "draft time, relative to the full head")
ENDS = {"draft, ms a round": "{0.stage_milliseconds[draft]:.2f}", "of full": "{1:.0%}"}
ENDS |= {name: COLUMNS[name] for name in ("speed-up", "decoding alone", "exact match")}


def head_table(title: str, rows: Rows, configs: dict[str, dict[str, Any]], size: int) -> Table:
    """Make a line for each trial: τ by task and relative to the full head, draft time, speed.

    Args:
        size: bytes of a number of the target's.
    """
    tasks = list(dict.fromkeys(task for _, task in rows))
    lines = []
    for name, config in configs.items():
        taus = [(rows[name, task].tau_per_token, tau_share(rows, name, task)) for task in tasks]
        cells = [dashed("{:.3f} ({:.1%})", *tau) for tau in taus]
        measured = rows[name, OVERALL], draft_share(rows, name)
        cells += [dashed(form, *measured) for form in ENDS.values()]
        lines.append([name, f"{read_share(config, size):.1%}", *cells])
    behind = (
        f"{task}: {rows[FULL, task].num_items} prompts, {rows[FULL, task].num_tokens} tokens"
        for task in tasks
    )
    legend = f"Behind the figures of each head: {'; '.join(behind)}.\n"
    return Table(title, ["head", "read", *(f"τ, {task}" for task in tasks), *ENDS], lines, legend)


def heat_maps(rows: Rows, configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, DataFrame]]:
    """Arrange the maps of the routed heads of each grouping and routing, (shares, groups) each."""
    cells = DataFrame(configs.values(), index=[*configs])
    cells = cells[cells.draft_head == "routed"]
    cells = cells.assign(groups=cells.num_groups.astype(int))
    cells["share that is read"] = cells.num_active_groups / cells.groups
    cells[MAPS[0]] = [tau_share(rows, name, OVERALL) for name in cells.index]
    cells[MAPS[1]] = [draft_share(rows, name) for name in cells.index]
    return {
        f"{grouping}-{routing}": {
            title: own.pivot_table(title, "share that is read", "groups", aggfunc="last")
            for title in MAPS
        }
        for (grouping, routing), own in cells.groupby(["grouping", "routing"])
        if own.groups.nunique() > 1
    }


def draw_heat_maps(maps: Mapping[str, DataFrame]) -> "Figure":
    """Draw a heat map for each title; the lightest cell is the best, the last map's the smallest.

    The index and columns of a table, (shares, groups), become its axes.
    """
    figure, panels = new_figure(len(maps), 4.5, 0.8 * len(next(iter(maps.values()))) + 1.6)
    colours = ("viridis", "viridis_r")
    for axes, (title, table), colour in zip(panels, maps.items(), colours, strict=True):
        axes.imshow(table, cmap=colour, aspect="auto")
        axes.grid(visible=False)
        for (y, x), value in np.ndenumerate(table):
            if value == value:
                axes.text(x, y, f"{value:.1%}", bbox=READABLE, ha="center", va="center")
        axes.set_xticks(range(table.shape[1]), [str(groups) for groups in table.columns])
        axes.set_yticks(range(table.shape[0]), [f"1/{1 / share:g}" for share in table.index])
        axes.set(title=title, xlabel=table.columns.name, ylabel=table.index.name)
    return figure


def draft_share(rows: Rows, name: str) -> float:
    """Divide a trial's draft time of a round by the full head's."""
    own, full = (rows[trial, OVERALL].stage_milliseconds["draft"] for trial in (name, FULL))
    return own / full


def tau_share(rows: Rows, name: str, task: str) -> float | None:
    """Divide a trial's τ by the full head's; None where there was no round."""
    own, full = (rows[trial, task].tau_per_token for trial in (name, FULL))
    return own / full if own and full else None


def read_share(config: dict[str, Any], size: int) -> float:
    """Divide the bytes that one drafted level of one sequence reads by those of the full head.

    What a head adds counts too: the router's weights, and of a quantized head, beside one byte
    instead of `size` for a number, the scale of each row.
    """
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    if config["draft_head"] == "frequency":
        return config["num_hot_tokens"] / vocab
    if config["draft_head"] == "routed":
        groups = Groups(vocab, config["num_groups"])
        read = min(config["num_active_groups"] * groups.size, vocab)
        return (read + hidden + groups.num_groups) / vocab
    row = (1 + 4 / hidden) / size if config["draft_head"] == "quantized" else 1.0
    return row * (config.get("draft_vocab_size") or vocab) / vocab


def compare_heads(
    own: CompareHeadsOptions, settings: HeadComparisonSettings, training_options: list[str]
) -> None:
    """Make draft heads for one drafter and measure them in turn, beside the full head."""
    trials = [HeadTrial.parse(text) for text in own.trial]
    prompts, rows = own.measured_prompts(), own.rows()
    settings.options = training_options
    target, drafter, tokenizer = own.load_models(own.pad_layers)
    beside = {Path(name).name: load_drafter(name, target) for name in own.beside}
    comparison = HeadComparison(target, tokenizer, rows, prompts, settings, drafter, beside)
    own.show(comparison.report(trials))


if __name__ == "__main__":
    compare_heads(**parse("compare_heads.py", compare_heads, sys.argv[1:]))
