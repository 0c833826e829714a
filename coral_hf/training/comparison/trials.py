"""Training runs compared: each trial trained from nothing and measured on the same data and tree.

In: a target, its tokenizer, conversations, prompts, trials. Out: a Result for each trial and seed,
one JSON line each, so that an interrupted comparison resumes.
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ...atomic import JsonLines, keep_settings, sole_writer
from ...drafters.coral.configuration import CoralConfig
from ...drafters.coral.modeling import CoralDrafter
from ...identity import digest, identify
from ...measure.calls import AnswerSettings, decoded_rounds
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

    settings: tuple[str, ...]  # `name=value` each

    @classmethod
    def parse(cls, text: str) -> "Trial":
        """Read `recipe name=value …`; the recipe may be left out."""
        words = text.split()
        if words and "=" not in words[0]:
            words[0] = f"recipe={words[0]}"
        if not words or any("=" not in word.strip("=") for word in words):
            raise ValueError(
                f"A trial is {text!r}; write a recipe and settings: 'coral csra_weight=0.5'."
            )
        return cls(tuple(words))

    @property
    def name(self) -> str:
        """The trial as it was typed."""
        return " ".join(word.removeprefix("recipe=") for word in self.settings)

    @property
    def options(self) -> list[str]:
        """The training settings as options of a command line."""
        own = [word for word in self.settings if not word.startswith(DRAFTER)]
        return [part for word in own for part in f"--{word}".split("=", 1)]

    @property
    def drafter_fields(self) -> dict[str, Any]:
        """The settings of the drafter's config, their values read as JSON.

        Raises:
            ValueError: for a field that `CoralConfig` lacks, and for a value that is not JSON.
        """
        own = [word for word in self.settings if word.startswith(DRAFTER)]
        pairs = (word.removeprefix(DRAFTER).split("=", 1) for word in own)
        return {name: _field_value(name, text) for name, text in pairs}


def _field_value(name: str, text: str) -> Any:
    """The value of a field of `CoralConfig`, from JSON."""
    # those that it declares itself; others are of transformers and shape no drafter
    known = CoralConfig.__annotations__
    if name not in known:
        raise ValueError(
            f"`{DRAFTER}{name}` is no field of CoralConfig; use one of {', '.join(known)}."
        )
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`{DRAFTER}{name}` is {text!r}, which is no JSON ({error}); write a number, true,"
            ' false, null or "text".'
        ) from error


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
    """The rows that all trials are trained on; those of a feature cache are taken as they are."""
    max_length = parse_arguments(settings.output, settings.options).max_length
    has_tokens = not hasattr(dataset, "column_names")
    return dataset if has_tokens else prepare_dataset(dataset, tokenizer, max_length)


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
        self.check(trials, steps)
        self.output.mkdir(parents=True, exist_ok=True)
        with sole_writer(self.output):
            keep_settings(self.output / "settings.json", self._identity(), self.output)
            self._lines.mend()
            yield

    def _identity(self) -> dict[str, Any]:
        """What results depend on beside their trial, seed and steps."""
        settings, target = self._settings, identify(self._target)
        return {
            "target": target.digest,
            "dtype": target.dtype,
            "quantization": target.quantization,
            "rows": rows_identity(self._rows),
            "prompts": digest(self._prompts),
            "options": settings.options,
            "temperatures": settings.temperatures,
            "max_new_tokens": settings.max_new_tokens,
            "tree": settings.drafting(),
        }

    def check(self, trials: Sequence[Trial], steps: Sequence[int]) -> None:
        """Raise now what a wrong setting would raise when its trial's turn comes."""
        if min(steps) < 1:
            raise ValueError(f"`steps` is {min(steps)}; use 1 or more.")
        for trial in trials:
            parse_arguments(self.output, [*self._settings.options, *trial.options])
            try:
                CoralDrafter.from_target(self._target, **trial.drafter_fields)
            except StrictDataclassError as error:
                raise ValueError(f"The trial {trial.name!r} makes no drafter: {error}") from error

    def result(self, trial: Trial, seed: int, steps: int) -> Result:
        """Train and measure a trial, or read what was measured before."""
        for result in (Result(**fields) for fields in self._lines.read()):
            if (result.trial, result.seed, result.steps) == (trial.name, seed, steps):
                return result
        start = time.perf_counter()
        drafter, logs = self._train(trial, seed, steps)
        result = Result(
            trial=trial.name,
            seed=seed,
            steps=steps,
            num_tokens=int(logs.pop("num_tokens")),
            seconds=time.perf_counter() - start,
            losses=logs,
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

    def _train(self, trial: Trial, seed: int, steps: int) -> tuple[CoralDrafter, dict[str, float]]:
        """A trained drafter in the target's dtype, its last losses and the tokens that it read."""
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
        kept: dict[str, float] = {}
        for entry in trainer.state.log_history:
            kept |= {k: v for k, v in entry.items() if k.endswith("_loss") or "agreement" in k}
        kept["num_tokens"] = trainer.state.num_input_tokens_seen
        return drafter.to(self._target.dtype).eval(), kept

    def _measure(self, drafter: CoralDrafter, temperature: float) -> dict[str, float]:
        """The τ of each task."""
        settings, target = self._settings, read_target(self._target)
        drafter.generation_config.update(**settings.drafting())
        answers = AnswerSettings(settings.max_new_tokens, temperature, settings.batch_size)
        return {
            # prompts of like length waste little
            task: mean(decoded_rounds(drafter, target, sorted(prompts, key=len), answers))
            for task, prompts in self._prompts.items()
        }
