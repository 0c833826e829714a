"""Comparison of training runs: each trial is trained from scratch, all on the same data and tree.

In: a target, its tokenizer, conversations, prompts, trials. Out: a Result for each trial and seed,
one JSON line each, so that an interrupted comparison resumes.
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, set_seed

from ...atomic import JsonLines, keep_settings, sole_writer
from ...drafters.coral.configuration import CoralConfig
from ...drafters.coral.modeling import CoralDrafter
from ...identity import digest, identify
from ...measure.calls import decoded_rounds
from ...measure.prompts import Prompt, encode
from ...measure.settings import ComparisonSettings, TrialSettings
from ...target import read_target
from .. import CoralTrainer, parse_arguments
from ..data import prepare_dataset
from ..runs.run_record import rows_identity

logger = logging.getLogger(__name__)
DRAFTER = "drafter."


class Trial(NamedTuple):
    """Settings of `CoralTrainingArguments` as they are typed: `coral csra_weight=0.5`.

    Those of the drafter's config have a prefix: `coral drafter.num_hidden_layers=2`.
    """

    name: str  # as it was typed
    options: list[str]  # of training, as on a command line
    drafter_fields: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Trial":
        """Read `recipe name=value …`; the recipe may be left out.

        Raises:
            ValueError: for another form, and for fields of the drafter that its config lacks.
        """
        words = text.removeprefix("recipe=").split()
        typed = words[:]
        if words and "=" not in words[0]:
            typed[0] = f"recipe={words[0]}"
        if not typed or any("=" not in word.strip("=") for word in typed):
            raise ValueError(
                f"A trial is {text!r}; write a recipe and settings: 'coral csra_weight=0.5'."
            )
        own = [word.removeprefix(DRAFTER) for word in typed if word.startswith(DRAFTER)]
        others = [word for word in typed if not word.startswith(DRAFTER)]
        options = [part for word in others for part in f"--{word}".split("=", 1)]
        return cls(" ".join(words), options, config_fields(own))


def config_fields(words: Iterable[str]) -> dict[str, Any]:
    """Read fields of `CoralConfig` as they are typed, `name=value` each.

    A value is JSON (`true`, `4`) or a string.

    Raises:
        ValueError: for a field that `CoralConfig` lacks, which it would accept and ignore, and for
            a value of another type.
    """
    # those that it declares itself; others are of transformers and shape no drafter
    known = CoralConfig.__annotations__
    config, fields = CoralConfig(), {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            raise ValueError(f"`{name}` is no field of CoralConfig; use one of {', '.join(known)}.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
        try:
            setattr(config, name, fields[name])
        except StrictDataclassError as error:
            raise ValueError(f"{word!r} does not fit CoralConfig: {error}") from error
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

    @property
    def mean_acceptance(self) -> float:
        """The mean τ over tasks and temperatures."""
        return mean(value for tasks in self.acceptance.values() for value in tasks.values())


def training_rows(dataset, tokenizer: PreTrainedTokenizerBase, settings: TrialSettings):
    """Return the rows that all trials are trained on; those of a feature cache are ready."""
    max_length = parse_arguments(settings.output, settings.options).max_length
    if not hasattr(dataset, "column_names"):  # a feature cache
        return dataset
    return prepare_dataset(dataset, tokenizer, max_length)


class Comparison:
    """Trains and measures trials; one that was measured before is not repeated.

    ```python
    with comparison.held(trials, [1000]):
        results = [comparison.result(trial, seed=0, steps=1000) for trial in trials]
    ```
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        dataset,
        prompts: Sequence[Prompt],
        settings: ComparisonSettings,
    ):
        """`dataset` in any form that `prepare_dataset` takes, or rows of a feature cache."""
        self._target, self._settings = target, settings
        self._prompts: dict[str, list[list[int]]] = {}
        for prompt in prompts:
            ids = encode(prompt, tokenizer)[0].tolist()
            self._prompts.setdefault(prompt.task, []).append(ids)
        self._rows = training_rows(dataset, tokenizer, settings)
        self.output = settings.output
        self._lines = JsonLines(settings.output / "results.jsonl")

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
            parse_arguments(self.output, [*self._settings.options, *trial.options])
            CoralDrafter.from_target(self._target, **trial.drafter_fields)
        depends_on = asdict(self._settings) | {
            "target": identify(self._target),
            "rows": rows_identity(self._rows),
            "prompts": digest(self._prompts),
        }
        del depends_on["output"], depends_on["batch_size"]
        with sole_writer(self.output):
            keep_settings(self.output / "settings.json", depends_on, self.output)
            self._lines.mend()
            yield

    def result(self, trial: Trial, seed: int, steps: int) -> Result:
        """Train and measure a trial, or read what was measured before."""
        for result in (Result(**fields) for fields in self._lines.read()):
            if (result.trial, result.seed, result.steps) == (trial.name, seed, steps):
                return result
        start = time.perf_counter()
        drafter, state = self._train(trial, seed, steps)
        logged = {name: value for entry in state.log_history for name, value in entry.items()}
        result = Result(
            trial=trial.name,
            seed=seed,
            steps=steps,
            num_tokens=int(state.num_input_tokens_seen),
            seconds=time.perf_counter() - start,
            losses={k: v for k, v in logged.items() if k.endswith("_loss") or "agreement" in k},
            acceptance={
                str(value): self._measure(drafter, value) for value in self._settings.temperatures
            },
        )
        self._lines.append([asdict(result)])
        logger.info(
            f"{trial.name}, seed {seed}, {steps} steps: τ {result.mean_acceptance:.3f} after"
            f" {result.seconds:.0f} s"
        )
        return result

    def _train(self, trial: Trial, seed: int, steps: int) -> tuple[CoralDrafter, TrainerState]:
        """Train a drafter and return it in the target's dtype, with what was logged."""
        with tempfile.TemporaryDirectory() as folder:
            args = parse_arguments(
                folder,
                [*self._settings.options, *trial.options],
                max_steps=steps,
                seed=seed,
                save_strategy="no",
                logging_steps=max(steps // 10, 1),
                disable_tqdm=True,
            )
            args.include_num_input_tokens_seen = "non_padding"
            set_seed(seed)
            drafter = CoralDrafter.from_target(self._target, **trial.drafter_fields).float()
            trainer = CoralTrainer(
                model=drafter, target_model=self._target, args=args, train_dataset=self._rows
            )
            trainer.train()
        return drafter.to(self._target.dtype).eval(), trainer.state

    def _measure(self, drafter: CoralDrafter, temperature: float) -> dict[str, float]:
        """Measure the τ of each task."""
        settings, target = self._settings, read_target(self._target)
        drafter.generation_config.update(**settings.drafting())
        sizes = settings.max_new_tokens, temperature, settings.batch_size
        return {
            # neighbours of similar length need little padding
            task: mean(decoded_rounds(drafter, target, sorted(prompts, key=len), *sizes))
            for task, prompts in self._prompts.items()
        }
