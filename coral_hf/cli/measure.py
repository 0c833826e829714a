"""Commands that show what drafting does, generate with a drafter, and measure drafters."""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .. import measure
from ..demo import DemoSettings
from ..measure.settings import ComparisonSettings, DraftingSettings, option
from .options import (
    DatasetOptions,
    DrafterOptions,
    MeasuredOptions,
    PromptOptions,
    TargetOptions,
    load_drafter,
)


def demo(settings: DemoSettings) -> None:
    """Train a drafter on a small target, load it back, and measure it. Needs no network."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    from ..demo.run import run_demo

    disable_progress_bars()  # a stage has one bar
    logging.disable_progress_bar()
    run_demo(settings)


@dataclass(kw_only=True)
class GenerateOptions(DrafterOptions, DraftingSettings):
    """The prompt, and how it is answered."""

    prompt: str = option("What to say to the target.", positional=True)
    max_new_tokens: int = option("Tokens to generate at most.", 256, least=1)
    temperature: float = option("0 is greedy.", 0.0, least=0)


def generate(own: GenerateOptions) -> None:
    """Generate with a drafter, streaming the text; accepted tokens are coloured by depth."""
    from ..measure.prompts import encode_said
    from ..measure.terminal import ColouredStreamer, call_line, unlogged

    target, drafter, tokenizer = own.load_models()
    ids = encode_said(own.prompt, tokenizer, target, own.max_new_tokens)  # (1, length)
    with unlogged("decoding.plain.draft_policy"):  # the last line says whether drafting paid
        output = target.generate(
            ids,
            assistant_model=drafter,
            streamer=ColouredStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            tokenizer=tokenizer,
            max_new_tokens=own.max_new_tokens,
            do_sample=own.temperature > 0,
            temperature=own.temperature or None,
            return_dict_in_generate=True,
            **own.drafting(),
        )
    head = own.draft_head or getattr(drafter.config, "draft_head", None)
    num_new = output.sequences.shape[1] - ids.shape[1]
    print(f"[{call_line(output.stats, num_new, head)}]", file=sys.stderr)


@dataclass(kw_only=True)
class PlaygroundOptions(TargetOptions):
    """The models of the page."""

    target: str = option("The target; the demo's by default.", "", needs="drafter")
    drafter: list[str] = option("One that the page offers; the demo's by default.", [])
    pad_layers: int | None = option("Show a target padded to so many layers.", None)


def playground(own: PlaygroundOptions) -> None:
    """Serve a page on which a prompt is answered without and with a drafter, side by side.

    Its port is the first free one from 7860 on, or the one that GRADIO_SERVER_PORT says.
    """
    if find_spec("gradio") is None:
        raise ValueError("Gradio is not here: pip install gradio, or coral_hf[playground].")
    if not own.target:
        demo = DemoSettings()
        if not demo.output.is_dir():
            remedy = "run `coral-hf demo` here first, or give --target and --drafter"
            raise ValueError(f"There is no folder `{demo.output}`: {remedy}.")
        own.target = str(demo.output / "target")
        own.drafter = own.drafter or [str(demo.output / "drafter")]
        own.pad_layers = own.pad_layers or demo.pad_layers
    from ..playground.page import serve
    from ..playground.race import Models

    target, tokenizer = own.load_target()
    target = measure.pad_target(target, own.pad_layers) if own.pad_layers else target
    models = Models(target, tokenizer, {name: load_drafter(name, target) for name in own.drafter})
    layers = target.config.get_text_config().num_hidden_layers
    padded = ", with padding" if own.pad_layers else ""
    serve(models, f"`{own.target}`, {layers} layers{padded}; {target.dtype}, `{target.device}`.")


@dataclass(kw_only=True)
class BenchmarkOptions(MeasuredOptions):
    """What is measured, and another method's model."""

    drafter: str = option("The drafter; an untrained one by default.", "")
    assistant: str | None = option("A small model for the method 'assisted'.", None)


def benchmark(own: BenchmarkOptions, settings: measure.BenchmarkSettings) -> None:
    """Measure a drafter against plain generation, methods interleaved."""
    target, drafter, tokenizer, prompts = own.load()
    assistant = None
    if own.assistant is not None:
        assistant, _ = TargetOptions(target=own.assistant, dtype=own.dtype).load_target()
    own.show(measure.run_benchmark(target, drafter, tokenizer, prompts, settings, assistant))


@dataclass(kw_only=True)
class VerifyOptions(DrafterOptions, PromptOptions):
    """What is verified, on which prompts."""

    prompts: list[Path] = option("As those of `benchmark`; a few built-in ones by default.", [])


def verify(own: VerifyOptions, settings: measure.VerifySettings) -> None:
    """Check that a drafter leaves its target's output unchanged; exits with 1 if it does not."""
    prompts = own.read_prompts()
    found = measure.verify(*own.load_models(), prompts, settings)
    print(found.to_markdown())
    if not found.is_lossless:
        sys.exit(1)


@dataclass(kw_only=True)
class CompareOptions(TargetOptions, DatasetOptions, PromptOptions):
    """Which training runs are compared."""

    trial: list[str] = option("A recipe and settings: 'coral csra_weight=0.5'.")
    steps: list[int] = option("Steps of each run; of the first rung if halving.", least=1)
    seeds: int = option("Runs of each trial.", 3, least=1)
    keep: int | None = option("Halve the trials to so many.", None, least=1, excludes="seeds")


def compare(own: CompareOptions, settings: ComparisonSettings, training_options: list[str]) -> None:
    """Train drafters with different settings and compare their acceptance lengths.

    Every other option is one of CoralTrainingArguments, the same for all trials.
    """
    from ..training import comparison

    if own.keep is not None and len(own.steps) > 1:
        raise ValueError("--keep searches from one --steps on; give --steps once.")
    trials = [comparison.Trial.parse(text) for text in own.trial]
    prompts, rows = own.measured_prompts(), own.rows()
    settings.options = training_options
    target, tokenizer = own.load_target()
    whole = comparison.Comparison(target, tokenizer, rows, prompts, settings)
    if own.keep is None:
        print(comparison.compare(whole, trials, own.steps, own.seeds))
    else:
        print(comparison.search(whole, trials, own.steps[0], own.keep))


@dataclass(kw_only=True)
class AutotuneOptions(MeasuredOptions):
    """Which drafter is tuned, for how long, and where the result goes."""

    output: Path = option("Folder of the two configs: the drafter's own, say.")
    max_seconds: float = option("No new call begins after them.", 45.0, least=0)


def autotune(own: AutotuneOptions) -> None:
    """Find the fastest draft head and tree on this machine, and save them with the drafter."""
    from ..atomic import write_json
    from ..drafters.model import TRAINING_RECORD
    from ..measure.autotune import autotune as find_tree

    target, drafter, tokenizer, prompts = own.load()
    ids = [measure.encode(prompt, tokenizer) for prompt in prompts]  # (1, length) each
    tuning = find_tree(drafter, target, ids, max_seconds=own.max_seconds)
    drafter.generation_config.save_pretrained(own.output)
    if tuning.heads:
        drafter.config.save_pretrained(own.output)
        if drafter.training_record:
            write_json(own.output / TRAINING_RECORD, drafter.training_record)
        print("; ".join(f"{name} {one['speedup']:.2f}x" for name, one in tuning.heads.items()))
    shown = " ".join(f"{name}={value}" for name, value in tuning.tree.items())
    print(f"{shown}: {tuning.speedup:.2f}x plain decoding, kept in {own.output}.")
