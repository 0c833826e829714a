"""Comparison of training runs: each trial is trained from scratch, all on the same data and tree.

In: a target, its tokenizer, conversations, prompts, trials. Out: a Result for each trial and seed,
one JSON line each, so that an interrupted comparison resumes.
"""

import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, TrainerCallback, TrainerState, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from ...atomic import JsonLines, keep_settings, sole_writer
from ...drafters.configuration import FamilyConfig
from ...drafters.coral import CoralConfig
from ...drafters.model import Drafter
from ...heads.settings import HeadFields
from ...identity import digest, identify
from ...measure.calls import decoded_rounds
from ...measure.prompts import Prompt, encode, fitting
from ...measure.settings import ComparisonSettings
from ...target import read_target
from .. import CoralTrainer, CoralTrainingArguments, parse_arguments
from ..data import prepare_dataset
from ..runs.checkpoints import last_checkpoint
from ..runs.run_record import rows_identity
from ..steps import TrainingStep, kind_of_recipe

logger = logging.getLogger(__name__)
DRAFTER = "drafter."


class Trial(NamedTuple):
    """Settings of `CoralTrainingArguments` as they are typed: `coral csra_weight=0.5`.

    Those of the drafter's config have a prefix: `coral drafter.num_hidden_layers=2`. The drafter is
    of the family that the recipe is for.
    """

    name: str  # as it was typed
    options: list[str]  # of training, as on a command line
    drafter_fields: dict[str, Any]
    kind: type[TrainingStep]

    def fresh(self, target: PreTrainedModel, args: CoralTrainingArguments) -> Drafter:
        """Make the drafter that is trained."""
        fields = self.kind.fresh_fields(args) | self.drafter_fields
        return self.kind.drafter.from_target(target, **fields)

    @classmethod
    def parse(cls, text: str) -> "Trial":
        """Read `recipe name=value …`; the recipe may be left out.

        Raises:
            ValueError: for another form, and for fields of the drafter that its config lacks.
        """
        first, *rest = text.removeprefix("recipe=").split() or [""]
        words = [first if "=" in first else f"recipe={first}", *rest]
        if not all(re.fullmatch("[^=]+=.+", word) for word in words):
            raise ValueError(f"A trial is {text!r}; write it as 'coral csra_weight=0.5'.")
        own = [word.removeprefix(DRAFTER) for word in words if word.startswith(DRAFTER)]
        options = [f"--{word}" for word in words if not word.startswith(DRAFTER)]
        recipes = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=")]
        kind = kind_of_recipe([CoralTrainingArguments.recipe, *recipes][-1])
        fields = config_fields(own, kind.drafter.config_class)
        return cls(" ".join([first, *rest]), options, fields, kind)


def config_fields(words: Iterable[str], kind: type[FamilyConfig] = CoralConfig) -> dict[str, Any]:
    """Read fields of a drafter's config as they are typed, `name=value` each.

    A value is JSON (`true`, `4`) or a string.

    Raises:
        ValueError: for a field that the config lacks, which it would accept and ignore, and for a
            value of another type.
    """
    # those that it declares itself; others are of transformers and shape no drafter
    bases = [base for base in kind.__mro__ if issubclass(base, FamilyConfig | HeadFields)]
    known = dict.fromkeys(name for base in reversed(bases) for name in base.__annotations__)
    config, fields = kind(), {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            raise ValueError(f"`{name}` is no field of {kind.__name__}: {', '.join(known)}.")
        fields[name] = value
        with suppress(json.JSONDecodeError):
            fields[name] = json.loads(value)
        try:
            setattr(config, name, fields[name])
        except StrictDataclassError as error:
            raise ValueError(f"{word!r} does not fit {kind.__name__}: {error}") from error
    return fields


@dataclass(frozen=True)
class Result:
    """One training run of one trial."""

    trial: str
    seed: int
    steps: int  # of the optimizer
    num_tokens: int  # read in training
    seconds: float  # of the training run
    losses: dict[str, float]  # the last that were logged
    acceptance: dict[str, dict[str, float]]  # temperature → task → τ
    # what each τ rests on: temperature → task → prompts, tokens of their rounds
    counts: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    @property
    def cells(self) -> dict[str, float]:
        """The τ of each task and temperature, and their mean, by the heading of a table."""
        found = {
            f"{task}, T={float(temperature):g}": tau
            for temperature, tasks in self.acceptance.items()
            for task, tau in tasks.items()
        }
        return found | {"mean": mean(found.values())}


@dataclass
class Comparison:
    """Trains and measures trials; one that was measured before is not repeated.

    ```python
    with comparison.held(trials, [1000]):
        results = [comparison.result(trial, seed=0, steps=1000) for trial in trials]
    ```
    """

    target: PreTrainedModel
    tokenizer: Tokenizer
    dataset: Any  # in any form that `prepare_dataset` takes, or rows of a feature cache
    prompts: Sequence[Prompt]
    settings: ComparisonSettings

    def __post_init__(self) -> None:
        max_length = parse_arguments(self.settings.output, self.settings.options).max_length
        if hasattr(self.dataset, "column_names"):  # rows of a feature cache are ready
            self.dataset = prepare_dataset(self.dataset, self.tokenizer, max_length)
        self._lines = JsonLines(self.settings.output / "results.jsonl")
        self._ids: dict[str, list[list[int]]] = {}  # of the prompts, by task
        if self.prompts:
            sizes = self.target, self.settings.max_new_tokens
            self.prompts = fitting(self.prompts, self.tokenizer, *sizes)
        for prompt in self.prompts:
            ids = encode(prompt, self.tokenizer)[0].tolist()
            self._ids.setdefault(prompt.task, []).append(ids)

    def keep_folder(self, **others: Any) -> None:
        """Raise a ValueError if results in the folder depend on another target, rows or others.

        Args:
            others: what they also depend on, such as `options`.
        """
        own = {"target": identify(self.target), "rows": rows_identity(self.dataset)}
        keep_settings(self.settings.output / "settings.json", own | others, self.settings.output)

    def fresh(self, trial: Trial) -> Drafter:
        """Make the drafter of a trial, by its settings."""
        options = [*self.settings.options, *trial.options]
        return trial.fresh(self.target, parse_arguments(self.settings.output, options))

    def train(
        self,
        drafter: Drafter,
        options: Sequence[str] = (),
        callbacks: Sequence[TrainerCallback] = (),
        kept: Path | None = None,
        **fields: Any,
    ) -> TrainerState:
        """Train a drafter or its head; the options are added to all trials'.

        Args:
            kept: folder of the last checkpoint, from which training goes on where there is one; if
                None, nothing is written.
        """
        fields |= {"disable_tqdm": True, "include_num_input_tokens_seen": "non_padding"}
        fields |= {"save_total_limit": 1} if kept else {"save_strategy": "no"}
        with tempfile.TemporaryDirectory() as folder:
            args = parse_arguments(kept or folder, [*self.settings.options, *options], **fields)
            known: dict[str, Any] = {"train_dataset": self.dataset, "callbacks": [*callbacks]}
            trainer = CoralTrainer(drafter, self.target, args, self.tokenizer, **known)
            trainer.train(last_checkpoint(args.output_dir, resume=True))
        return trainer.state

    @contextmanager
    def held(self, trials: Sequence[Trial], steps: Sequence[int]) -> Iterator[None]:
        """Check all that will be trained, then keep the folder of the results to this comparison.

        Raises:
            ValueError: for settings that cannot be trained, and if another comparison holds the
                folder or one with other settings has filled it.
        """
        if min(steps) < 1:
            raise ValueError(f"`steps` is {min(steps)}; use 1 or more.")
        for trial in trials:
            self.fresh(trial)
        depends_on = asdict(self.settings)
        del depends_on["output"], depends_on["batch_size"]
        depends_on["recipe"] = CoralTrainingArguments.recipe  # of trials that name none
        with sole_writer(self.settings.output):
            self.keep_folder(prompts=digest(self._ids), **depends_on)
            self._lines.mend()
            yield

    def result(self, trial: Trial, seed: int, steps: int) -> Result:
        """Train and measure a trial, or read what was measured before."""
        for result in (Result(**fields) for fields in self._lines.read()):
            if (result.trial, result.seed, result.steps) == (trial.name, seed, steps):
                return result
        set_seed(seed)
        drafter = self.fresh(trial).float()
        often = max(steps // 10, 1)
        state = self.train(drafter, trial.options, max_steps=steps, seed=seed, logging_steps=often)
        drafter = drafter.to(self.target.dtype).eval()
        drafter.generation_config.update(**self.settings.drafting())
        logged = {name: value for entry in state.log_history for name, value in entry.items()}
        target, acceptance, counts = read_target(self.target), {}, {}
        for temperature in self.settings.temperatures:
            sizes = self.settings.max_new_tokens, temperature, self.settings.batch_size
            rounds = {  # of all prompts; neighbours of similar length need little padding
                task: decoded_rounds(drafter, target, sorted(ids, key=len), *sizes)
                for task, ids in self._ids.items()
            }
            acceptance[str(temperature)] = {task: mean(one) for task, one in rounds.items()}
            counts[str(temperature)] = {
                task: [len(ids), sum(rounds[task])] for task, ids in self._ids.items()
            }
        result = Result(
            trial=trial.name,
            seed=seed,
            steps=steps,
            num_tokens=int(state.num_input_tokens_seen),
            seconds=logged["train_runtime"],
            losses={k: v for k, v in logged.items() if k.endswith("_loss") or "agreement" in k},
            acceptance=acceptance,
            counts=counts,
        )
        self._lines.append([asdict(result)])
        logger.info(f"{trial.name}, seed {seed}, {steps} steps: τ {result.cells['mean']:.3f}")
        return result
