"""Commands that generate with a drafter, and measure drafters."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..measure.settings import (
    BenchmarkSettings,
    ComparisonSettings,
    DraftingSettings,
    HeadComparisonSettings,
    SweepSettings,
    option,
)
from .options import (
    DRAFTER,
    DatasetOptions,
    PaddedTargetOptions,
    PromptOptions,
    TargetOptions,
    load_drafter,
    load_target,
    token_ids,
)
from .parser import refuse

REPORT = "Folder of report.json, report.md and the plots."


@dataclass(kw_only=True)
class GenerateOptions(TargetOptions, DraftingSettings):
    """The prompt, and how it is answered."""

    prompt: str = option("What to say to the target.", positional=True)
    drafter: str = option(DRAFTER)
    max_new_tokens: int = option("Tokens to generate at most.", 256, least=1)
    temperature: float = option("0 is greedy.", 0.0, least=0)


def generate(own: GenerateOptions) -> None:
    """Generate with a drafter, streaming the text."""
    from transformers import TextStreamer

    from ..measure.prompts import Prompt, encode, user_message

    model, tokenizer = own.load_target()
    prompt = Prompt("prompt", "0", text=own.prompt)
    if tokenizer.chat_template is not None:
        prompt = Prompt("prompt", "0", (user_message(own.prompt),))
    output = model.generate(
        encode(prompt, tokenizer).to(model.device),
        assistant_model=load_drafter(own.drafter, model),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        tokenizer=tokenizer,
        max_new_tokens=own.max_new_tokens,
        do_sample=own.temperature > 0,
        temperature=own.temperature or None,
        return_dict_in_generate=True,
        **own.drafting(),
    )
    length, passes = output.stats.acceptance_length, len(output.stats.round_lengths)
    print(f"[{length:.2f} tokens per target pass, {passes} passes]", file=sys.stderr)


@dataclass(kw_only=True)
class ReportOptions:
    """Where a report goes."""

    output: Path = option(REPORT)

    def show(self, report) -> None:
        """Write a report and print its tables."""
        from rich.console import Console

        report.write(self.output)
        Console().print(*report.to_rich_tables())


@dataclass(kw_only=True)
class BenchmarkOptions(PaddedTargetOptions, PromptOptions, ReportOptions):
    """The drafters that are measured."""

    drafter: str | None = option("The drafter; an untrained one by default.", None)
    assistant: str | None = option("A small model for the method 'assisted'.", None)
    bigram_dataset: str | None = option("Text that the method 'bigram' counts.", None)
    bigram_hold_out: int = option("Rows at its end that are not counted.", 0, least=0)


def benchmark(own: BenchmarkOptions, settings: BenchmarkSettings) -> None:
    """Measure a drafter against plain generation, methods interleaved."""
    from ..drafters.bigram import BigramDrafter
    from ..measure import run_benchmark

    items = own.read_prompts()
    model, tokenizer = own.load_target()
    others: dict[str, Any] = {}
    if own.assistant is not None:
        others["assistant"] = load_target(own.assistant, own.dtype)[0]
    if own.bigram_dataset is not None:
        data = DatasetOptions(dataset=[own.bigram_dataset], hold_out=own.bigram_hold_out)
        texts = [ids[0] for ids in token_ids(data.conversations(), tokenizer)]  # (length,) each
        vocab_size = model.config.get_text_config().vocab_size
        others["bigram"] = BigramDrafter.from_texts(texts, vocab_size)
    drafter = load_drafter(own.drafter, model)
    own.show(run_benchmark(model, drafter, tokenizer, items, settings, **others))


@dataclass(kw_only=True)
class SweepOptions(PaddedTargetOptions, PromptOptions, ReportOptions):
    """The drafter that is measured."""

    drafter: str = option(DRAFTER)


def sweep(own: SweepOptions, settings: SweepSettings) -> None:
    """Measure a drafter by batch size and by length of the context."""
    from ..measure import run_sweep

    prompts = own.read_prompts()
    model, tokenizer = own.load_target()
    own.show(run_sweep(model, load_drafter(own.drafter, model), tokenizer, prompts, settings))


@dataclass(kw_only=True)
class CompareOptions(TargetOptions, DatasetOptions, PromptOptions):
    """Which training runs are compared."""

    trial: list[str] = option("A recipe and settings: 'coral csra_weight=0.5'.")
    steps: list[int] = option("Steps of each run; of the first rung if halving.", least=1)
    seeds: int | None = option("Runs of each trial; 3 by default.", None, least=1)
    keep: int | None = option("Halve the trials down to so many, with one seed.", None, least=1)

    def __post_init__(self) -> None:
        is_search, is_grid = self.keep is not None, self.seeds is not None or len(self.steps) > 1
        refuse(is_search and is_grid, "--keep searches with one seed from one --steps on.")


def compare(own: CompareOptions, settings: ComparisonSettings, training_options: list[str]) -> None:
    """Train drafters with different settings and compare what they are worth.

    Every other option is one of CoralTrainingArguments, the same for all trials.
    """
    from ..training.comparison import Comparison, Trial, search
    from ..training.comparison import compare as compare_trials

    trials = [Trial.parse(text) for text in own.trial]
    rows, items = own.rows(), own.read_prompts()
    settings.options = training_options
    model, tokenizer = own.load_target()
    comparison = Comparison(model, tokenizer, rows, items, settings)
    if own.keep is None:
        print(compare_trials(comparison, trials, own.steps, own.seeds or 3))
    else:
        print(search(comparison, trials, own.steps[0], own.keep))


@dataclass(kw_only=True)
class CompareHeadsOptions(PaddedTargetOptions, DatasetOptions, PromptOptions):
    """Which heads are compared."""

    drafter: str = option(DRAFTER)
    trial: list[str] = option("'routed grouping=kmeans num_groups=16 num_active_groups=2'.")


def compare_heads(
    own: CompareHeadsOptions, settings: HeadComparisonSettings, training_options: list[str]
) -> None:
    """Make draft heads for one drafter and measure them in turn, beside the full head.

    Every other option is one of CoralTrainingArguments, for the heads that are trained.
    """
    from ..training.comparison import HeadComparison, HeadTrial

    trials = [HeadTrial.parse(text) for text in own.trial]
    rows, items = own.rows(), own.read_prompts()
    settings.options = training_options
    model, tokenizer = own.load_target()
    drafter = load_drafter(own.drafter, model)
    comparison = HeadComparison(model, tokenizer, drafter, rows, settings)
    ReportOptions(output=settings.output).show(comparison.report(trials, items))


@dataclass(kw_only=True)
class AutotuneOptions(PaddedTargetOptions, PromptOptions):
    """Which drafter is tuned, for how long, and where the result goes."""

    drafter: str = option(DRAFTER)
    output: Path = option("Folder of generation_config.json: the drafter's own, say.")
    max_seconds: float = option("No new call begins after them.", 45.0, least=0)


def autotune(own: AutotuneOptions) -> None:
    """Find the draft tree that pays best on this machine, and keep it beside the drafter."""
    from ..measure.autotune import autotune as find_tree
    from ..measure.prompts import encode

    prompts = own.read_prompts()
    model, tokenizer = own.load_target()
    drafter = load_drafter(own.drafter, model)
    ids = [encode(prompt, tokenizer) for prompt in prompts]  # (1, length) each
    tuning = find_tree(drafter, model, ids, max_seconds=own.max_seconds)
    drafter.generation_config.save_pretrained(own.output)
    shown = " ".join(f"{name}={value}" for name, value in tuning.tree.items())
    print(f"{shown}: {tuning.speedup:.2f}x plain decoding, kept in {own.output}.")
