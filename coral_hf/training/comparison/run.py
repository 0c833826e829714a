"""The comparison: each trial trained from nothing and measured, with the same data and tree.

In: a target, its tokenizer, conversations, prompts. Out: a `Result` for each trial and seed.
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ... import CoralDrafter
from ...identity import identify
from ...measure import Prompt, encode
from ...target import read_target
from .. import CoralTrainer, parse_arguments
from ..data import prepare_dataset
from ..evaluation import AnswerSettings, decoded_rounds
from ..runs.files import JsonLines, keep_settings, sole_writer
from ..runs.run_record import rows_identity
from .results import Result, read_results
from .trial import Trial

logger = logging.getLogger(__name__)
RESULTS, SETTINGS = "results.jsonl", "settings.json"


@dataclass
class ComparisonSettings:
    """What all trials share."""

    output: Path  # of the results
    options: list[str] = field(default_factory=list)  # of the trainer, as on a command line
    temperatures: Sequence[float] = (0.0, 1.0)
    max_new_tokens: int = 64
    batch_size: int = 8  # prompts that are answered at once
    tree: Mapping[str, int] = field(default_factory=dict)  # `tree_depth` and the like


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
        self._target = target
        self._tokenizer = tokenizer
        self._settings = settings
        self._prompts: dict[str, list[list[int]]] = {}
        for prompt in prompts:
            ids = encode(prompt, tokenizer)[0].tolist()
            self._prompts.setdefault(prompt.task, []).append(ids)
        max_length = parse_arguments(settings.output, settings.options).max_length
        has_tokens = not hasattr(dataset, "column_names")
        self._rows = dataset if has_tokens else prepare_dataset(dataset, tokenizer, max_length)

    @contextmanager
    def held(self, trials: Sequence[Trial], steps: Sequence[int]) -> Iterator[None]:
        """Check all that will be trained, then keep the folder of the results to this comparison.

        Raises:
            ValueError: for settings that cannot be trained, and if another comparison holds the
                folder or one with other settings has filled it.
        """
        self.check(trials, steps)
        with sole_writer(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
            keep_settings(self.output / SETTINGS, self._identity(), self.output)
            JsonLines(self.output / RESULTS).mend()
            yield

    def _identity(self) -> dict[str, Any]:
        """What results depend on beside their trial, seed and steps."""
        settings, target = self._settings, identify(self._target)
        return {
            "target": target.digest,
            "dtype": target.dtype,
            "quantization": target.quantization,
            "rows": rows_identity(self._rows),
            "prompts": sha256(json.dumps(self._prompts).encode()).hexdigest(),
            "options": settings.options,
            "temperatures": [*settings.temperatures],
            "max_new_tokens": settings.max_new_tokens,
            "tree": dict(settings.tree),
        }

    def check(self, trials: Sequence[Trial], steps: Sequence[int]) -> None:
        """Raise now what a wrong setting would raise when its trial's turn comes."""
        if min(steps) < 1:
            raise ValueError(f"`steps` is {min(steps)}; use 1 or more.")
        for trial in trials:
            parse_arguments(self._settings.output, [*self._settings.options, *trial.options])
            try:
                CoralDrafter.from_target(self._target, **trial.drafter_fields)
            except StrictDataclassError as error:
                raise ValueError(f"The trial {trial.name!r} makes no drafter: {error}") from error

    @property
    def output(self) -> Path:
        """The folder of the results."""
        return self._settings.output

    @property
    def results(self) -> list[Result]:
        """All that were measured so far."""
        return read_results(self._settings.output / RESULTS)

    def result(self, trial: Trial, seed: int, steps: int) -> Result:
        """Train and measure a trial, or read what was measured before."""
        for result in self.results:
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
        JsonLines(self._settings.output / RESULTS).append([asdict(result)])
        logger.info(
            f"{trial.name}, seed {seed}, {steps} steps: τ {result.mean_acceptance:.3f} after"
            f" {result.seconds:.0f} s"
        )
        return result

    def _train(self, trial: Trial, seed: int, steps: int) -> tuple[CoralDrafter, dict[str, float]]:
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
        """τ of each task."""
        settings = self._settings
        drafter.generation_config.update(**settings.tree)
        target = read_target(self._target)
        answers = AnswerSettings(settings.max_new_tokens, temperature, settings.batch_size)
        return {
            # prompts of like length waste little
            task: mean(decoded_rounds(drafter, target, sorted(prompts, key=len), answers))
            for task, prompts in self._prompts.items()
        }
