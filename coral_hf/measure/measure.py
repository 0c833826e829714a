"""The measurement: every method on every prompt, in turn, timed and compared with the target alone.

In: a target, a drafter, prompts, settings. Out: a Report. Methods alternate prompt by prompt, and
which comes first rotates, so that a machine that slows down slows all of them.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.bigram import BigramDrafter
from ..target import max_positions, text_config
from .environment import describe_environment
from .methods import Drafters, Generation, Method, build_methods
from .mismatch import Mismatch, first_difference, top2_gap
from .prompts import Prompt, encode
from .report import Report
from .runs import Run
from .settings import BenchmarkSettings
from .timing import Timed, timed

logger = logging.getLogger(__name__)


class Trial(NamedTuple):
    """One turn of a prompt and what each method made of it."""

    prompt: Prompt
    turn: int  # 0 is the first
    ids: Tensor  # (1, length)
    generations: dict[str, list[Timed[Generation]]]  # by method, one for each repeat
    is_sampled: bool

    @property
    def plain_tokens(self) -> list[int]:
        """What the target alone answers."""
        return self.generations["plain"][0].result.tokens


def run_benchmark(
    target: PreTrainedModel,
    drafter: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: BenchmarkSettings | None = None,
    assistant: PreTrainedModel | None = None,
    bigram: BigramDrafter | None = None,
) -> Report:
    """Measure a drafter, and the other methods that the settings name, against plain `generate`.

    Args:
        target: a causal language model of transformers, on the device and in the dtype to measure.
        drafter: a CoralDrafter for it; None where "coral" is not among the methods.
        tokenizer: the target's.
        prompts: from `read_prompts`; those too long for the target's context are only listed.
        settings: the defaults where None.
        assistant: a small model with the target's vocabulary, for "assisted".
        bigram: counted on text that is not measured on, for "bigram".
    """
    settings = settings or BenchmarkSettings()
    methods = build_methods(target, Drafters(drafter, bigram, assistant), settings)
    bench = Bench(target, tokenizer, methods, settings)
    fitting = fitting_prompts(bench, prompts)
    bench.warm_up(fitting)
    trials = list(bench.trials(fitting))
    return Report(
        settings=settings,
        environment=describe_environment(target, drafter, assistant),
        runs=[run for item, trial in enumerate(trials) for run in runs_of(trial, item)],
        mismatches=[found for trial in trials for found in mismatches_of(trial, target)],
        skipped=[f"{prompt.task}/{prompt.id}" for prompt in prompts if not bench.fits(prompt)],
    )


class Bench(NamedTuple):
    """What stays the same from prompt to prompt."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    methods: dict[str, Method]
    settings: BenchmarkSettings

    def encode(self, prompt: Prompt) -> Tensor:
        """(1, length) ids on the target's device."""
        return encode(prompt, self.tokenizer).to(self.target.device)

    def fits(self, prompt: Prompt) -> bool:
        """Whether the target's context holds the prompt and its answer."""
        context = max_positions(text_config(self.target))
        tokens = encode(prompt, self.tokenizer).shape[1] + self.settings.max_new_tokens
        return context is None or tokens <= context

    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        """Run every method on the first prompts and forget it: allocators and kernels settle."""
        for number in range(self.settings.warmup):
            ids = self.encode(prompts[number % len(prompts)])
            for name in self.methods:
                self.generate_once(name, ids, self.settings.seed)

    def trials(self, prompts: Sequence[Prompt]) -> Iterator[Trial]:
        """Every turn of every prompt."""
        for number, prompt in enumerate(prompts):
            yield from self.turns(prompt, number)
            logger.info("%d of %d prompts: %s %s", number + 1, len(prompts), prompt.task, prompt.id)

    def turns(self, prompt: Prompt, number: int) -> Iterator[Trial]:
        """The turns of a prompt, each asked after the target's own answer to the one before."""
        for turn in range(self.settings.max_turns):
            ids = self.encode(prompt)
            trial = Trial(
                prompt, turn, ids, self.generate(ids, number + turn), self.settings.do_sample
            )
            yield trial
            if not prompt.turns:
                return
            prompt = prompt.follow_up(
                self.tokenizer.decode(trial.plain_tokens, skip_special_tokens=True)
            )
            if not self.fits(prompt):
                return

    def generate(self, ids: Tensor, number: int) -> dict[str, list[Timed[Generation]]]:
        """Every method on the same ids (1, length), in an order that rotates with each repeat."""
        names = list(self.methods)
        generations: dict[str, list[Timed[Generation]]] = {name: [] for name in names}
        for repeat in range(self.settings.repeats):
            first = (number + repeat) % len(names)
            for name in names[first:] + names[:first]:
                generations[name].append(self.generate_once(name, ids, self.settings.seed + repeat))
        return generations

    def generate_once(self, name: str, ids: Tensor, seed: int) -> Timed[Generation]:
        """One method on ids (1, length)."""
        device = self.target.device
        # transformers samples from the global generator, which is left as it was
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return timed(lambda: self.methods[name](ids), device)


def fitting_prompts(bench: Bench, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those that the target's context holds.

    Raises:
        ValueError: if it holds none.
    """
    fitting = [prompt for prompt in prompts if bench.fits(prompt)]
    if not fitting:
        raise ValueError(
            f"none of the {len(prompts)} `prompts` fits the target's context; give a shorter one."
        )
    return fitting


def runs_of(trial: Trial, item: int) -> Iterator[Run]:
    """The record of every call of a trial."""
    prompt, is_sampled = trial.prompt, trial.is_sampled
    for method, repeats in trial.generations.items():
        for repeat, (generation, seconds, peak_bytes) in enumerate(repeats):
            yield Run(
                item=item,
                task=prompt.task,
                prompt=prompt.id,
                turn=trial.turn,
                method=method,
                repeat=repeat,
                prompt_length=trial.ids.shape[1],
                num_tokens=len(generation.tokens),
                seconds=seconds,
                round_lengths=generation.round_lengths,
                stage_seconds=generation.stage_seconds,
                peak_bytes=peak_bytes,
                equals_plain=None if is_sampled else generation.tokens == trial.plain_tokens,
            )


def mismatches_of(trial: Trial, target: PreTrainedModel) -> Iterator[Mismatch]:
    """Each method's first difference from "plain", in its first repeat; none of sampled tokens."""
    if trial.is_sampled:
        return
    expected, prompt = trial.plain_tokens, trial.prompt
    for method, repeats in trial.generations.items():
        position = first_difference(expected, repeats[0].result.tokens)
        if position is not None:
            gap = top2_gap(target, trial.ids, expected[:position])
            yield Mismatch(prompt.task, prompt.id, trial.turn, method, position, gap)
