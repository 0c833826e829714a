"""Commands that generate with a drafter, and measure drafters."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .options import (
    DRAFTER,
    DatasetOptions,
    HeadOptions,
    PaddedTargetOptions,
    PromptOptions,
    SpeculationOptions,
    TargetOptions,
    TreeOptions,
    load_drafter,
    load_target,
)
from .parser import option

REPORT = "Folder of report.json, report.md and the plots."
METHODS = Literal["plain", "coral", "bigram", "prompt_lookup", "assisted"]
MAX_LENGTH = 2048  # tokens of a conversation in which bigrams are counted


@dataclass(kw_only=True)
class GenerateOptions:
    """The prompt, and how it is answered."""

    prompt: str = option("What to say to the target.", positional=True)
    drafter: str = option(DRAFTER)
    max_new_tokens: int = option("Tokens to generate at most.", 256, least=1)
    temperature: float = option("0 is greedy.", 0.0, least=0)


def generate(target: TargetOptions, own: GenerateOptions, drafting: SpeculationOptions) -> None:
    """Generate with a drafter, streaming the text."""
    from transformers import TextStreamer

    from ..measure.prompts import Prompt, encode, user_message

    model, tokenizer = target.load()
    is_chat = tokenizer.chat_template is not None
    asked: dict[str, Any] = (
        {"messages": (user_message(own.prompt),)} if is_chat else {"text": own.prompt}
    )
    output = model.generate(
        encode(Prompt(task="prompt", id="0", **asked), tokenizer).to(model.device),
        assistant_model=load_drafter(own.drafter, model),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        tokenizer=tokenizer,
        max_new_tokens=own.max_new_tokens,
        do_sample=own.temperature > 0,
        temperature=own.temperature or None,
        return_dict_in_generate=True,
        **drafting.given(),
    )
    length, passes = output.stats.acceptance_length, len(output.stats.round_lengths)
    print(f"[{length:.2f} tokens per target pass, {passes} passes]", file=sys.stderr)


@dataclass(kw_only=True)
class BenchmarkOptions:
    """What is measured."""

    output: Path = option(REPORT)
    drafter: str | None = option("The drafter; an untrained one by default.", None)
    methods: list[METHODS] = option("What is compared.", ["plain", "coral"], flag="method")
    assistant: str | None = option("A small model for the method 'assisted'.", None)
    bigram_dataset: str | None = option("Text that the method 'bigram' counts.", None)
    bigram_hold_out: int = option("Rows at its end that are not counted.", 0, least=0)
    max_new_tokens: int = option("Tokens of each answer.", 128)
    temperature: float = option("0 is greedy.", 0.0)
    repeats: int = option("Runs of each prompt and method.", 1)
    seed: int = option("Seed of the sampling.", 0)
    speculation: Literal["always", "adaptive"] = option(
        "'always' drafts in every round, 'adaptive' where it pays.", "always"
    )


def benchmark(
    target: PaddedTargetOptions,
    prompts: PromptOptions,
    own: BenchmarkOptions,
    drafting: SpeculationOptions,
) -> None:
    """Measure a drafter against plain generation, runs interleaved."""
    from rich.console import Console

    from ..measure import BenchmarkSettings, run_benchmark

    settings = BenchmarkSettings(
        methods=list(own.methods),
        max_new_tokens=own.max_new_tokens,
        do_sample=own.temperature > 0,
        temperature=own.temperature or 1.0,
        repeats=own.repeats,
        seed=own.seed,
        speculation=own.speculation,
        tree=drafting.given(),
    )
    items = prompts.read()
    model, tokenizer = target.load()
    others: dict[str, Any] = {}
    if own.assistant is not None:
        others["assistant"] = load_target(own.assistant, target.dtype)[0]
    if own.bigram_dataset is not None:
        others["bigram"] = _count_bigrams(own, model, tokenizer)
    drafter = load_drafter(own.drafter, model)
    report = run_benchmark(model, drafter, tokenizer, items, settings, **others)
    report.write(own.output)
    Console().print(report.to_rich_table())


def _count_bigrams(own: BenchmarkOptions, target, tokenizer):
    """Return a BigramDrafter of the text of conversations, but for the last rows."""
    import torch

    from ..drafters.bigram import BigramDrafter
    from ..training.data import prepare_dataset

    data = DatasetOptions(dataset=[str(own.bigram_dataset)], hold_out=own.bigram_hold_out)
    rows = prepare_dataset(data.conversations(), tokenizer, MAX_LENGTH)
    tokens = (torch.tensor(row["input_ids"]) for row in rows)  # (length,)
    return BigramDrafter.from_texts(tokens, target.config.get_text_config().vocab_size)


@dataclass(kw_only=True)
class SweepOptions:
    """What is swept."""

    drafter: str = option(DRAFTER)
    output: Path = option(REPORT)
    batch_size: list[int] = option("Prompts at once.", [])
    context: list[int] = option("Tokens before the answer.", [])
    max_new_tokens: int = option("Tokens of each answer.", 128)
    repeats: int = option("Runs of each batch and method.", 3)


def sweep(
    target: PaddedTargetOptions, prompts: PromptOptions, own: SweepOptions, tree: HeadOptions
) -> None:
    """Measure a drafter by batch size and by length of the context."""
    from rich.console import Console

    from ..measure import SweepSettings, run_sweep

    settings = SweepSettings(
        own.batch_size, own.context, own.max_new_tokens, own.repeats, tree=tree.given()
    )
    items = prompts.read()
    model, tokenizer = target.load()
    report = run_sweep(model, load_drafter(own.drafter, model), tokenizer, items, settings)
    report.write(own.output)
    Console().print(*report.to_rich_tables())


@dataclass(kw_only=True)
class CompareOptions:
    """Which training runs are compared."""

    output: Path = option("Folder of the results; resumed if it has some.")
    trial: list[str] = option("A recipe and settings: 'coral csra_weight=0.5'.")
    steps: list[int] = option("Steps of each run; of the first rung if halving.", least=1)
    seeds: int | None = option("Runs of each trial; 3 by default.", None, least=1)
    keep: int | None = option("Halve the trials down to so many, with one seed.", None, least=1)
    temperature: list[float] = option("Measured at.", [0.0, 1.0])
    # a round of decoding follows the token of the prefill
    max_new_tokens: int = option("Tokens of each answer.", 64, least=2)

    def __post_init__(self) -> None:
        if self.keep is not None and (self.seeds is not None or len(self.steps) > 1):
            raise ValueError("--keep searches with one seed from one number of --steps on.")


def compare(
    target: TargetOptions,
    data: DatasetOptions,
    prompts: PromptOptions,
    own: CompareOptions,
    tree: TreeOptions,
    training_options: list[str],
) -> None:
    """Train drafters with different settings and compare what they are worth.

    Every other option is one of CoralTrainingArguments, the same for all trials.
    """
    from ..training.comparison import Comparison, ComparisonSettings, Trial, search
    from ..training.comparison import compare as compare_trials

    trials = [Trial.parse(text) for text in own.trial]
    rows, items = data.rows(), prompts.read()
    settings = ComparisonSettings(
        output=own.output,
        options=training_options,
        temperatures=own.temperature,
        max_new_tokens=own.max_new_tokens,
        tree=tree.given(),
    )
    model, tokenizer = target.load()
    comparison = Comparison(model, tokenizer, rows, items, settings)
    if own.keep is None:
        print(compare_trials(comparison, trials, own.steps, own.seeds or 3))
    else:
        print(search(comparison, trials, own.steps[0], own.keep))


@dataclass(kw_only=True)
class CompareHeadsOptions:
    """Which heads are compared."""

    drafter: str = option(DRAFTER)
    output: Path = option("Folder of the heads and the report.")
    trial: list[str] = option("'routed grouping=kmeans num_groups=16 num_active_groups=2'.")
    temperature: list[float] = option("Measured at.", [0.0, 1.0])
    max_new_tokens: int = option("Tokens of each answer.", 64)
    repeats: int = option("Runs of each prompt and head.", 1)


def compare_heads(
    target: PaddedTargetOptions,
    data: DatasetOptions,
    prompts: PromptOptions,
    own: CompareHeadsOptions,
    tree: TreeOptions,
    training_options: list[str],
) -> None:
    """Make draft heads for one drafter and measure them in turn, beside the whole head.

    Every other option is one of CoralTrainingArguments, for the heads that are trained.
    """
    from rich.console import Console

    from ..measure.head_comparison import HeadComparison, HeadSettings, HeadTrial

    trials = [HeadTrial.parse(text) for text in own.trial]
    rows, items = data.rows(), prompts.read()
    settings = HeadSettings(
        output=own.output,
        options=training_options,
        temperatures=own.temperature,
        max_new_tokens=own.max_new_tokens,
        repeats=own.repeats,
        tree=tree.given(),
    )
    model, tokenizer = target.load()
    drafter = load_drafter(own.drafter, model)
    comparison = HeadComparison(model, tokenizer, drafter, rows, settings)
    report = comparison.report(trials, items)
    report.write(own.output)
    Console().print(*(report.table(value).to_rich() for value in report.runs))
