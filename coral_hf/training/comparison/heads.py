"""Draft heads of one drafter, side by side: made once, then measured in turn on the same prompts.

In: a drafter, its target, training rows, prompts, trials. Out: a Report: a table for each
temperature, and heat maps over the number of groups and the share that is read.
"""

import copy
import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ...atomic import keep_settings, new_folder
from ...drafters.coral.configuration import CoralConfig
from ...drafters.coral.modeling import CoralDrafter
from ...heads.groups import Groups
from ...heads.settings import DRAFT_HEADS
from ...identity import weights_digest
from ...measure import plots
from ...measure.benchmark import measure_prompts
from ...measure.calls import Bench, Call, sampling_arguments
from ...measure.prompts import Prompt
from ...measure.report import Environment, Report, Table, dashed, describe_environment
from ...measure.settings import HeadComparisonSettings
from ...measure.summary import OVERALL, Row, summarise_tasks
from ...target import read_target
from .. import CoralTrainer, parse_arguments
from ..grouping import most_frequent_first, token_counts
from ..runs.run_record import rows_identity
from .trials import training_rows

logger = logging.getLogger(__name__)
FULL = "full"  # the head that the others are compared with

# what a head is made with, by its name; the other settings are of reading it
MADE_WITH: dict[str, dict[str, type]] = {
    FULL: {},
    "routed": {"grouping": str, "num_groups": int},
    "frequency": {"num_hot_tokens": int},
    "low_rank": {"head_rank": int},
}
READ_WITH = {
    "num_active_groups": int,
    "routing": str,
    "max_active_groups": int,
    "active_mass": float,
}
# how a head is read where a trial does not say
READ_ALONE = {name: getattr(CoralConfig, name) for name in READ_WITH if name != "num_active_groups"}


class HeadTrial(NamedTuple):
    """`routed grouping=kmeans num_groups=32 num_active_groups=4`: fields of `CoralConfig`."""

    name: str  # as it was typed
    head: str
    made_with: dict[str, Any]
    read_with: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "HeadTrial":
        """Read a head's name and settings.

        Raises:
            ValueError: for an unknown head, setting or value.
        """
        head, *words = text.split() or [""]
        if head not in DRAFT_HEADS:
            raise ValueError(f"A trial is {text!r}; begin it with a head: {DRAFT_HEADS}.")
        types = {**MADE_WITH[head], **(READ_WITH if head == "routed" else {})}
        fields = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in types or not value:
                raise ValueError(f"{word!r} in {text!r}: write name=value with one of {[*types]}.")
            try:
                fields[name] = types[name](value)
            except ValueError as error:
                raise ValueError(
                    f"{word!r} in {text!r}: {name} is of type {types[name].__name__}."
                ) from error
        missing = [name for name in MADE_WITH[head] if name not in fields]
        if missing:
            raise ValueError(f"The trial {text!r} lacks {missing}; write them as name=value.")
        made_with = {name: fields.pop(name) for name in MADE_WITH[head]}
        return cls(" ".join([head, *words]), head, made_with, fields)

    @property
    def key(self) -> str:
        """A folder's name, which trials share whose heads are made alike."""
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
        settings, calls = self._settings, []
        for temperature in settings.temperatures:
            common = sampling_arguments(temperature, settings.max_new_tokens)
            drafting = common | {"speculation": "always", **settings.drafting()}
            methods = {name: drafting | {"assistant_model": own} for name, own in heads.items()}
            methods["plain"] = common
            bench = Bench(self._target, methods, settings.repeats, warmup=1, seed=settings.seed)
            calls += measure_prompts(bench, self._tokenizer, prompts).calls
        configs = {name: drafter.config.to_dict() for name, drafter in heads.items()}
        environment = describe_environment(self._target, self._drafter)
        return head_report(settings, environment, calls, configs)

    def drafter_for(self, trial: HeadTrial) -> CoralDrafter:
        """The drafter with a trial's head, which it reads, in the target's dtype."""
        folder = self._settings.output / "heads" / trial.key
        if not folder.exists():
            logger.info("making %s", trial.key)
            with new_folder(folder) as aside:
                self._make(trial).save_pretrained(aside)
        drafter = CoralDrafter.from_pretrained(folder, dtype=self._target.dtype).eval()
        drafter.heads.configure(**{**READ_ALONE, "draft_head": trial.head, **trial.read_with})
        return drafter.to(self._drafter.device)

    def _make(self, trial: HeadTrial) -> CoralDrafter:
        """A copy of the drafter with a trial's head, trained or counted."""
        drafter = copy.deepcopy(self._drafter).float()
        if trial.head == "routed":
            drafter.heads.remove_router()
            self._train(drafter, "router", trial)
        elif trial.head == "low_rank":
            drafter.heads.remove_low_rank_head()
            self._train(drafter, "low_rank", trial)
        elif trial.head == "frequency":
            tokens = most_frequent_first(token_counts(read_target(self._target), self._rows))
            number = trial.made_with["num_hot_tokens"]
            if number > len(tokens):
                raise ValueError(
                    f"`num_hot_tokens` is {number}; use a value up to the target's {len(tokens)}."
                )
            drafter.heads.add_frequency_head(tokens[:number])
        return drafter

    def _train(self, drafter: CoralDrafter, stage: str, trial: HeadTrial) -> None:
        """Train the head of a stage, for which the drafter is frozen."""
        active = {k: v for k, v in trial.read_with.items() if k == "num_active_groups"}
        own = {"save_strategy": "no", "disable_tqdm": True, "plots": False}
        with tempfile.TemporaryDirectory() as folder:
            args = parse_arguments(
                folder, self._settings.options, stage=stage, **own, **trial.made_with, **active
            )
            set_seed(args.seed)
            CoralTrainer(
                model=drafter,
                target_model=self._target,
                args=args,
                train_dataset=self._rows,
                processing_class=self._tokenizer,
            ).train()


Rows = dict[tuple[str, str], Row]  # (trial, task) → its numbers at one temperature


def head_report(
    settings: HeadComparisonSettings,
    environment: Environment,
    calls: list[Call],
    configs: dict[str, dict[str, Any]],
) -> Report:
    """A table for each temperature, and heat maps of routed heads.

    Args:
        configs: of the drafter of each trial, by its name, which is the method of its calls.
    """
    tables: list[Table] = []
    figures: dict[str, Callable] = {}
    for temperature in settings.temperatures:
        own = summarise_tasks([call for call in calls if call.temperature == temperature])
        rows = {(row.method, row.task): row for row in own}
        tables.append(head_table(f"T = {temperature:g}", rows, configs))
        for family, maps in sweeps(rows, configs).items():
            if len({groups for groups, _ in maps[0]}) > 1:
                draw = partial(plots.heat_maps, dict(zip(MAPS, maps, strict=True)), *AXES)
                figures[f"sweep-{family}-{temperature:g}"] = draw
    return Report(
        settings=settings,
        environment=environment,
        calls=calls,
        numbers={"trials": configs},
        tables=tables,
        figures=figures,
    )


MAPS = ("τ, of the full head's", "draft time, of the full head's")
AXES = ("groups", "share that is read")


def head_table(title: str, rows: Rows, configs: dict[str, dict[str, Any]]) -> Table:
    """A line for each trial: tau by task with its share of the full head's, draft time, speed."""
    tasks = list(dict.fromkeys(task for _, task in rows))
    ends = ["draft, ms a round", "of full", "speed-up", "decoding alone", "exact match"]
    lines = []
    for name, config in configs.items():
        taus = [
            dashed("{:.3f} ({:.1%})", rows[name, task].tau_per_token, tau_share(rows, name, task))
            for task in tasks
        ]
        form = "{0.stage_milliseconds[draft]:.2f}|{1:.0%}|{0.speedup:.2f}x"
        form += "|{0.decoding_speedup:.2f}x|{0.exact_match:.1%}"
        cells = dashed(form, rows[name, OVERALL], draft_share(rows, name)).split("|")
        lines.append([name, f"{read_share(config):.1%}", *taus, *cells])
    return Table(title, ["head", "read", *(f"τ, {task}" for task in tasks), *ends], lines)


def sweeps(rows: Rows, configs: dict[str, dict[str, Any]]) -> dict[str, list[dict]]:
    """The cells of both heat maps by grouping and routing; a cell is groups and share read."""
    found: dict[str, list[dict]] = {}
    for name, config in configs.items():
        if config["draft_head"] == "routed":
            family = f"{config['grouping']}-{config['routing']}"
            taus, drafts = found.setdefault(family, [{}, {}])
            number = config["num_groups"]
            cell = number, config["num_active_groups"] / number
            taus[cell] = tau_share(rows, name, OVERALL)
            drafts[cell] = draft_share(rows, name)
    return found


def draft_share(rows: Rows, name: str) -> float:
    """A trial's draft time of a round, of the full head's."""
    own, full = (rows[trial, OVERALL].stage_milliseconds["draft"] for trial in (name, FULL))
    return own / full


def tau_share(rows: Rows, name: str, task: str) -> float | None:
    """A trial's tau, of the full head's; None where there was no round."""
    own, full = (rows[trial, task].tau_per_token for trial in (name, FULL))
    return own / full if own and full else None


def read_share(config: dict[str, Any]) -> float:
    """The bytes that a level of one row reads, of those of the full head.

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
