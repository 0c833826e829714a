"""Training runs compared: each trial trained from nothing and measured on the same data and tree.

In: a target, its tokenizer, conversations, prompts, trials. Out: a Result for each trial and seed,
one JSON line each, so that an interrupted comparison resumes; a table of mean and spread.
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ...atomic import JsonLines, keep_settings, sole_writer, write_text
from ...drafters.coral.configuration import CoralConfig
from ...drafters.coral.modeling import CoralDrafter
from ...identity import digest, identify
from ...measure import plots
from ...measure.calls import AnswerSettings, decoded_rounds
from ...measure.prompts import Prompt, encode
from ...measure.report import Table
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


def compare(
    comparison: Comparison, trials: Sequence[Trial], steps: Sequence[int], seeds: int
) -> str:
    """Train each trial for each number of steps and each seed; returns the tables.

    They are written to `table.md`, and for several numbers of steps a plot to `scaling.png`.
    """
    with comparison.held(trials, steps):
        results = [
            [comparison.result(trial, seed, number) for seed in range(seeds) for trial in trials]
            for number in steps
        ]
        if len(steps) > 1:
            plot_scaling([one for part in results for one in part], comparison.output)
        return _write_tables(comparison, results)


def search(comparison: Comparison, trials: Sequence[Trial], steps: int, keep: int) -> str:
    """Successive halving with one seed; returns the table of each rung, written to `table.md`."""
    with comparison.held(trials, [steps]):
        return _write_tables(comparison, halve(comparison, trials, steps, keep))


def halve(
    comparison: Comparison, trials: Sequence[Trial], steps: int, keep: int, seed: int = 0
) -> list[list[Result]]:
    """Train all trials for `steps`, the better half for twice as long, and so on.

    Successive halving (Jamieson and Talwalkar 2016). Every rung trains from nothing, since a
    learning rate that has fallen to its end cannot be continued.

    Args:
        keep: trials that are left at the end.

    Returns:
        the results of each rung, the best first.
    """
    if keep < 1:
        raise ValueError(f"`keep` is {keep}; keep at least 1 trial.")
    rungs, left = [], list(trials)
    while True:
        results = [(comparison.result(trial, seed, steps), trial) for trial in left]
        results.sort(key=lambda pair: -pair[0].mean_acceptance)
        rungs.append([result for result, _ in results])
        if len(left) <= keep:
            return rungs
        left = [trial for _, trial in results[: max(-(-len(left) // 2), keep)]]
        steps *= 2


def _write_tables(comparison: Comparison, parts: Sequence[Sequence[Result]]) -> str:
    """The tables of results by steps, written to `table.md`."""
    text = "\n".join(f"{part[0].steps} steps\n\n{comparison_table(part)}" for part in parts)
    write_text(comparison.output / "table.md", text)
    return text


def comparison_table(results: Sequence[Result]) -> str:
    """A table in Markdown; the first trial of `results` is what the others are compared with.

    A cell is the mean τ over seeds ± the standard deviation. The last column is the difference of
    the mean τ to the first trial, paired by seed, ± its standard error; below two standard errors
    there is no measurable difference.
    """
    columns = [(value, task) for value, tasks in results[0].acceptance.items() for task in tasks]
    rows = []
    by_trial = group_by_trial(results)
    first = next(iter(by_trial.values()))
    for name, own in by_trial.items():
        cells = [_spread([r.acceptance[value][task] for r in own]) for value, task in columns]
        mean_cell = _spread([r.mean_acceptance for r in own])
        rows.append([name, *cells, mean_cell, _difference(own, first)])
    tasks = [f"{task}, T={float(value):g}" for value, task in columns]
    return Table("", ["trial", *tasks, "mean", "difference"], rows).to_markdown()


def group_by_trial(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by the name of their trial."""
    names = dict.fromkeys(result.trial for result in results)
    return {name: [result for result in results if result.trial == name] for name in names}


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def _difference(own: Sequence[Result], first: Sequence[Result]) -> str:
    theirs = {result.seed: result.mean_acceptance for result in first}
    gaps = [r.mean_acceptance - theirs[r.seed] for r in own if r.seed in theirs]
    if own[0].trial == first[0].trial or len(gaps) < 2:
        return ""
    error = stdev(gaps) / len(gaps) ** 0.5
    verdict = "" if abs(mean(gaps)) > 2 * error else ", no measurable difference"
    return f"{mean(gaps):+.3f} ± {error:.3f}{verdict}"


def plot_scaling(results: Sequence[Result], folder: Path) -> None:
    """Draw the mean τ over the tokens that were read: a line for each trial, a dot for each run."""
    figure, (axes,) = plots.new_figure(width=6.0, height=4.0)
    lines = []
    for index, (name, own) in enumerate(group_by_trial(results).items()):
        colour = plots.COLOURS[index % len(plots.COLOURS)]
        by_steps = [[r for r in own if r.steps == n] for n in sorted({r.steps for r in own})]
        tokens = [mean(r.num_tokens for r in runs) for runs in by_steps]
        values = [mean(r.mean_acceptance for r in runs) for runs in by_steps]
        lines.append(plots.Line(name, tokens, values, "-", colour))
        dots = [r.num_tokens for r in own], [r.mean_acceptance for r in own]
        axes.scatter(*dots, s=12, color=colour)
    plots.draw_lines(axes, lines)
    axes.set(xscale="log", xlabel="tokens read in training", ylabel="τ, tokens per target pass")
    plots.save(figure, folder / "scaling.png")
