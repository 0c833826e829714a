"""The demo: train a small target and a drafter for it, then generate with and without the drafter.

In: DemoSettings. Out: reports; the drafter, reports and plots in the output folder; tables and
coloured answers in the terminal. Trained models are cached, so a second run only generates.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..measure.benchmark import run_benchmark
from ..measure.calls import Call
from ..measure.padding import pad_target
from ..measure.prompts import Prompt, encode
from ..measure.report import Report
from ..measure.settings import BenchmarkSettings
from ..training.data.show import token_texts
from . import DemoSettings
from .corpus import held_out_prompts
from .models import cached, train_drafter, train_target

NUM_SHOWN_TEXTS = 2
ACCEPTED_STYLE = "bold green"


def run_demo(settings: DemoSettings | None = None, console: Console | None = None) -> list[Report]:
    """Train what is not cached, load it back, measure it on held-out prompts and show the result.

    Args:
        settings: the defaults where None: no network, at most six minutes on two CPU cores the
            first time, one minute from the cache.
        console: where tables and answers go; the terminal if None.

    Returns:
        The reports at the target's own depth, and padded.
    """
    settings, console = settings or DemoSettings(), console or Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.target is None:
        own = cached(settings, console, "target", partial(train_target, settings, device))
        settings = replace(settings, target=str(own))  # on which the drafter depends
    target = AutoModelForCausalLM.from_pretrained(settings.target, dtype="auto").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings.target)
    train = partial(train_drafter, settings, target, tokenizer)
    trained = cached(settings, console, "drafter", train)
    folder = settings.output / "drafter"
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    drafter = AutoModel.from_pretrained(folder, dtype=target.dtype).to(device)

    prompts = held_out_prompts(settings)
    console.rule(f"{len(prompts)} held-out prompts, {settings.max_new_tokens} new tokens each")
    measured = BenchmarkSettings(max_new_tokens=settings.max_new_tokens, seed=settings.seed)
    targets = [target]
    depth = target.config.get_text_config().num_hidden_layers
    if depth < settings.pad_layers:
        targets.append(pad_target(target, settings.pad_layers))
    reports = [run_benchmark(one, drafter, tokenizer, prompts, measured) for one in targets]
    answers = {call.prompt: call for call in reports[0].calls if call.method == "coral"}
    for prompt in [prompt for prompt in prompts if prompt.id in answers][:NUM_SHOWN_TEXTS]:
        console.print(accepted_text(tokenizer, prompt, answers[prompt.id]))
        console.rule(Text("coloured: proposed by the drafter, accepted", ACCEPTED_STYLE))
    for report in reports:
        num_layers = report.environment.num_target_layers
        report.write(settings.output / f"{num_layers}-layers")
        padding = f"{report.environment.num_padded_layers} of them padding"
        console.rule(f"A target of {num_layers} layers, {padding}")
        console.print(Markdown(report.tables[0].to_markdown()))
    console.print(f"The drafter, reports and plots are in {settings.output}.", soft_wrap=True)
    return reports


def accepted_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, call: Call) -> Text:
    """Return a prompt and its answer, in which the accepted tokens of the drafter are coloured."""
    ids = encode(prompt, tokenizer)[0]  # (length,)
    text = Text(tokenizer.decode(ids, skip_special_tokens=True), "dim")
    pieces = token_texts(call.tokens[0], tokenizer)
    for piece, is_drafted in zip(pieces, accepted_tokens(call.round_lengths), strict=True):
        text.append(piece, ACCEPTED_STYLE if is_drafted else "not dim")
    return text


def accepted_tokens(round_lengths: Sequence[int]) -> list[bool]:
    """Tell which new tokens the drafter had proposed.

    pass            0 (prefill)   1            2        3
    emitted         x0            x1 x2 x3     x4       x5 x6
    proposed        –             x1 x2        –        x5       the last of a pass is the target's
    """
    return [False, *(i < length for length in round_lengths for i in range(1, length + 1))]
