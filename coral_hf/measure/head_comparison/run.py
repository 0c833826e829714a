"""The measurement of draft heads: each on every prompt in turn, beside the target alone.

In: a drafter, its target, training rows, prompts, trials. Out: a `HeadReport`. As in a benchmark,
trials alternate prompt by prompt, so that a machine that slows down slows all of them.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ... import CoralDrafter
from ...training import parse_arguments
from ...training.data import prepare_dataset
from ...training.features import CachedFeatures
from ...training.runs.files import digest, keep_settings
from .. import BenchmarkSettings, Prompt
from ..environment import describe_environment
from ..measure import Bench, fitting_prompts, runs_of
from ..methods import Method, generate_in_trees, generate_plain, sampling_arguments
from .heads import Heads
from .report import HeadReport
from .trial import HeadTrial

logger = logging.getLogger(__name__)
SETTINGS = "settings.json"
FULL = HeadTrial.parse("full")


@dataclass
class HeadSettings:
    """What all trials share."""

    output: Path  # of heads and report
    options: list[str] = field(default_factory=list)  # of the heads' trainer, as they are typed
    temperatures: Sequence[float] = (0.0, 1.0)
    max_new_tokens: int = 64
    repeats: int = 1
    seed: int = 0
    tree: Mapping[str, int | str | bool] = field(default_factory=dict)


class HeadComparison:
    """Makes the heads of trials and measures them."""

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drafter: CoralDrafter,
        dataset,
        settings: HeadSettings,
    ):
        """`dataset` in any form that `prepare_dataset` takes, or rows of a feature cache."""
        self._target = target
        self._tokenizer = tokenizer
        self._settings = settings
        self._drafter = drafter
        max_length = parse_arguments(settings.output, settings.options).max_length
        has_tokens = not hasattr(dataset, "column_names")
        rows = dataset if has_tokens else prepare_dataset(dataset, tokenizer, max_length)
        settings.output.mkdir(parents=True, exist_ok=True)
        made_from = {
            "target": target.config._name_or_path,
            "drafter": _digest_of_weights(drafter),
            "rows": rows.index.fingerprint if isinstance(rows, CachedFeatures) else digest(rows),
            "options": settings.options,
        }
        keep_settings(settings.output / SETTINGS, made_from, settings.output)
        folder = settings.output / "heads"
        self._heads = Heads(drafter, target, tokenizer, rows, folder, settings.options)

    def report(self, trials: Sequence[HeadTrial], prompts: Sequence[Prompt]) -> HeadReport:
        """Measure trials, and the whole head beside them."""
        trials = list({trial.name: trial for trial in [FULL, *trials]}.values())
        drafters = {trial.name: self._heads.drafter_for(trial) for trial in trials}
        return HeadReport(
            trials={name: drafter.config.to_dict() for name, drafter in drafters.items()},
            runs={str(value): self._runs(drafters, prompts, value) for value in self._temperatures},
            environment=describe_environment(self._target, self._drafter, None),
        )

    @property
    def _temperatures(self) -> Sequence[float]:
        return self._settings.temperatures

    def _runs(self, drafters, prompts: Sequence[Prompt], temperature: float) -> list:
        """The runs of all trials at one temperature."""
        shared = self._settings
        settings = BenchmarkSettings(
            max_new_tokens=shared.max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            repeats=shared.repeats,
            seed=shared.seed,
        )
        common = sampling_arguments(settings)
        methods: dict[str, Method] = {"plain": partial(generate_plain, self._target, common)}
        for name, drafter in drafters.items():
            drafting = {"assistant_model": drafter, "speculation": "always", **shared.tree}
            methods[name] = partial(generate_in_trees, self._target, common | drafting)
        bench = Bench(self._target, self._tokenizer, methods, settings)
        fitting = fitting_prompts(bench, prompts)
        bench.warm_up(fitting)
        trials = enumerate(bench.trials(fitting))
        return [run for item, trial in trials for run in runs_of(trial, item)]


def _digest_of_weights(drafter: CoralDrafter) -> str:
    """SHA-256 of all that a drafter has learned."""
    found = sha256()
    for name, tensor in sorted(drafter.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
