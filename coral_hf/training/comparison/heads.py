"""Comparison of draft heads: each is made once for a drafter, all are measured on the same prompts.

In: a drafter, its target, training rows, prompts, trials. Out: a Report: a table for each
temperature, and heat maps over the number of groups and the share that is read.
"""

import copy
import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from pandas import DataFrame
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ...atomic import keep_settings, new_folder
from ...drafters.coral.configuration import CoralConfig
from ...drafters.coral.modeling import CoralDrafter
from ...heads.groups import Groups
from ...identity import weights_digest
from ...measure import plots
from ...measure.benchmark import measure_prompts
from ...measure.calls import Bench, Call, sampling_arguments
from ...measure.prompts import Prompt
from ...measure.report import Report, Table, dashed, describe_environment
from ...measure.settings import HeadComparisonSettings
from ...measure.summary import OVERALL, Row, summarise_tasks
from ...target import read_target
from .. import CoralTrainer, parse_arguments
from ..grouping import most_frequent_first, token_counts
from ..runs.run_record import rows_identity
from .trials import config_fields, training_rows

logger = logging.getLogger(__name__)
FULL = "full"  # the head that the others are compared with
STAGES = {"routed": "router", "low_rank": "low_rank"}  # training stages of heads

# the fields of `CoralConfig` that a head is made with, and those that a routed one is read with
MADE_WITH = {
    FULL: (),
    "routed": ("grouping", "num_groups"),
    "frequency": ("num_hot_tokens",),
    "low_rank": ("head_rank",),
}
READ_WITH = ("num_active_groups", "routing", "max_active_groups", "active_mass")
READ_ALONE = {name: getattr(CoralConfig, name) for name in READ_WITH[1:]}  # unless a trial says


class HeadTrial(NamedTuple):
    """`routed grouping=kmeans num_groups=32 num_active_groups=4`: a head, fields of its config."""

    name: str  # as it was typed
    head: str
    made_with: dict[str, Any]
    read_with: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "HeadTrial":
        """Read a head's name and settings.

        Raises:
            ValueError: for an unknown head, and settings that are missing, of another head, or not
                of their type.
        """
        head, *words = text.split() or [""]
        fields = config_fields(words)
        needed = MADE_WITH.get(head, ())
        extra = fields.keys() - {*needed, *(READ_WITH if head == "routed" else ())}
        if head not in MADE_WITH or extra or not fields.keys() >= {*needed}:
            raise ValueError(
                f"A trial is {text!r}; write a head with what it is made with as name=value, of"
                f" {MADE_WITH}; 'routed' also takes {READ_WITH}."
            )
        made_with = {name: fields.pop(name) for name in needed}
        return cls(" ".join([head, *words]), head, made_with, fields)

    @property
    def key(self) -> str:
        """The name of the head's folder, which trials share if they only read it differently."""
        return "-".join([self.head, *map(str, self.made_with.values())])


class HeadComparison:
    """Makes the heads of trials, each once for an output folder, and measures them."""

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drafter: CoralDrafter,
        dataset,
        settings: HeadComparisonSettings,
    ):
        """`dataset` in any form that `prepare_dataset` takes, or rows of a feature cache."""
        self._target, self._tokenizer, self._drafter = target, tokenizer, drafter
        self._settings = settings
        self._rows = training_rows(dataset, tokenizer, settings)
        settings.output.mkdir(parents=True, exist_ok=True)
        made_from = {
            "target": target.config._name_or_path,
            "drafter": weights_digest(drafter),
            "rows": rows_identity(self._rows),
            "options": settings.options,
        }
        keep_settings(settings.output / "settings.json", made_from, settings.output)

    def report(self, trials: Sequence[HeadTrial], prompts: Sequence[Prompt]) -> Report:
        """Measure trials, and the full head beside them."""
        trials = list({trial.name: trial for trial in [HeadTrial.parse(FULL), *trials]}.values())
        heads = {trial.name: self.drafter_for(trial) for trial in trials}
        configs = {name: drafter.config.to_dict() for name, drafter in heads.items()}
        settings = self._settings
        calls: list[Call] = []
        tables: list[Table] = []
        figures: dict[str, Callable] = {}
        for temperature in settings.temperatures:
            common = sampling_arguments(temperature, settings.max_new_tokens)
            drafting = common | {"speculation": "always", **settings.drafting()}
            methods = {name: drafting | {"assistant_model": own} for name, own in heads.items()}
            methods["plain"] = common
            bench = Bench(self._target, methods, settings.repeats, warmup=1, seed=settings.seed)
            measured = measure_prompts(bench, self._tokenizer, prompts).calls
            rows = {(row.method, row.task): row for row in summarise_tasks(measured)}
            calls += measured
            tables.append(head_table(f"T = {temperature:g}", rows, configs))
            for family, maps in heat_maps(rows, configs).items():
                figures[f"sweep-{family}-{temperature:g}"] = partial(plots.heat_maps, maps)
        environment = describe_environment(self._target, self._drafter)
        return Report(settings, environment, calls, {"trials": configs}, tables, figures)

    def drafter_for(self, trial: HeadTrial) -> CoralDrafter:
        """Return the drafter that reads a trial's head, in the target's dtype."""
        folder = self._settings.output / "heads" / trial.key
        if not folder.exists():
            logger.info("making %s", trial.key)
            with new_folder(folder) as aside:
                self._make(trial).save_pretrained(aside)
        drafter = CoralDrafter.from_pretrained(folder, dtype=self._target.dtype).eval()
        drafter.heads.configure(**{**READ_ALONE, "draft_head": trial.head, **trial.read_with})
        return drafter.to(self._drafter.device)

    def _make(self, trial: HeadTrial) -> CoralDrafter:
        """Copy the drafter and give it a trial's head, trained or counted."""
        drafter = copy.deepcopy(self._drafter).float()
        drafter.heads.remove_router()
        drafter.heads.remove_low_rank_head()
        if trial.head in STAGES:
            self._train(drafter, trial)
        elif trial.head == "frequency":
            drafter.heads.configure(**trial.made_with)  # raises beyond the vocabulary
            tokens = most_frequent_first(token_counts(read_target(self._target), self._rows))
            drafter.heads.add_frequency_head(tokens[: trial.made_with["num_hot_tokens"]])
        return drafter

    def _train(self, drafter: CoralDrafter, trial: HeadTrial) -> None:
        """Train the head of a trial, for which the drafter is frozen."""
        own = {"save_strategy": "no", "disable_tqdm": True, "plots": False}
        own |= {"stage": STAGES[trial.head], **trial.made_with}
        if "num_active_groups" in trial.read_with:
            own["num_active_groups"] = trial.read_with["num_active_groups"]
        with tempfile.TemporaryDirectory() as folder:
            args = parse_arguments(folder, self._settings.options, **own)
            set_seed(args.seed)
            CoralTrainer(
                model=drafter,
                target_model=self._target,
                args=args,
                train_dataset=self._rows,
                processing_class=self._tokenizer,
            ).train()


Rows = dict[tuple[str, str], Row]  # (trial, task) → its numbers at one temperature
MAPS = ("τ, relative to the full head", "draft time, relative to the full head")
ENDS = {
    "draft, ms a round": "{0.stage_milliseconds[draft]:.2f}",
    "of full": "{1:.0%}",
    "speed-up": "{0.speedup:.2f}x",
    "decoding alone": "{0.decoding_speedup:.2f}x",
    "exact match": "{0.exact_match:.1%}",
}


def head_table(title: str, rows: Rows, configs: dict[str, dict[str, Any]]) -> Table:
    """Make a line for each trial: τ by task and relative to the full head, draft time, speed."""
    tasks = list(dict.fromkeys(task for _, task in rows))
    lines = []
    for name, config in configs.items():
        taus = [
            dashed("{:.3f} ({:.1%})", rows[name, task].tau_per_token, tau_share(rows, name, task))
            for task in tasks
        ]
        measured = rows[name, OVERALL], draft_share(rows, name)
        ends = [dashed(form, *measured) for form in ENDS.values()]
        lines.append([name, f"{read_share(config):.1%}", *taus, *ends])
    return Table(title, ["head", "read", *(f"τ, {task}" for task in tasks), *ENDS], lines)


def heat_maps(rows: Rows, configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, DataFrame]]:
    """Arrange the maps of the routed heads of each grouping and routing, (shares, groups) each."""
    cells = DataFrame(
        {
            "family": f"{config['grouping']}-{config['routing']}",
            "groups": config["num_groups"],
            "share that is read": config["num_active_groups"] / config["num_groups"],
            MAPS[0]: tau_share(rows, name, OVERALL),
            MAPS[1]: draft_share(rows, name),
        }
        for name, config in configs.items()
        if config["draft_head"] == "routed"
    )
    return {
        family: {
            title: own.pivot_table(title, "share that is read", "groups", aggfunc="last")
            for title in MAPS
        }
        for family, own in (cells.groupby("family") if len(cells) else ())
        if own.groups.nunique() > 1
    }


def draft_share(rows: Rows, name: str) -> float:
    """Divide a trial's draft time of a round by the full head's."""
    own, full = (rows[trial, OVERALL].stage_milliseconds["draft"] for trial in (name, FULL))
    return own / full


def tau_share(rows: Rows, name: str, task: str) -> float | None:
    """Divide a trial's τ by the full head's; None where there was no round."""
    own, full = (rows[trial, task].tau_per_token for trial in (name, FULL))
    return own / full if own and full else None


def read_share(config: dict[str, Any]) -> float:
    """Divide the bytes that one drafted level of one sequence reads by those of the full head.

    What a head adds counts too: the router's weights, the low-rank head's `down`.
    """
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    if config["draft_head"] == "frequency":
        return config["num_hot_tokens"] / vocab
    if config["draft_head"] == "low_rank":
        return config["head_rank"] * (vocab + hidden) / (vocab * hidden)
    if config["draft_head"] == "routed":
        groups = Groups(vocab, config["num_groups"])
        read = min(config["num_active_groups"] * groups.size, vocab)
        return (read + hidden + groups.num_groups) / vocab
    return 1.0
