"""The demo: train a small target and a drafter for it, then generate with and without the drafter.

In: DemoSettings. Out: a DemoResult; the drafter, reports and plots in the output folder; a table
and coloured answers in the terminal. Trained models are cached, so a second run only generates.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.text import Text
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from ..measure.benchmark import run_benchmark
from ..measure.calls import Call
from ..measure.padding import pad_target
from ..measure.prompts import Prompt, encode
from ..measure.report import Report, Table, tabulate
from ..measure.settings import BenchmarkSettings
from ..measure.summary import OVERALL
from . import DemoSettings
from .corpus import held_out_prompts
from .models import cached, train_drafter, train_target

NUM_SHOWN_TEXTS = 2
ACCEPTED_STYLE = "bold green"
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of half a character
# of a report's environment and its rows for the target alone and with the drafter
COLUMNS = {
    "target": "{0[0].num_target_layers} layers ({0[0].num_padded_layers} padding)",
    "tau": "{0[2].tau_per_token:.2f}",
    "tokens/s alone": "{0[1].tokens_per_second:.1f}",
    "with the drafter": "{0[2].tokens_per_second:.1f}",
    "speed-up": "{0[2].speedup:.2f}x",
    "exact match": "{0[2].exact_match:.1%}",
}


class DemoResult(NamedTuple):
    """Reports and files of a demo run."""

    reports: list[Report]  # at the target's own depth, then padded
    drafter: Path  # the folder of the drafter and the tokenizer
    acceptance: Path  # the plot of acceptance by depth


def run_demo(settings: DemoSettings | None = None, console: Console | None = None) -> DemoResult:
    """Train what is not cached, load it back, measure it on held-out prompts and show the result.

    Args:
        settings: the defaults where None: no network, at most six minutes on two CPU cores the
            first time, one minute from the cache.
        console: where tables and answers go; the terminal if None.
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
    console.print(results_table(reports).to_rich())
    for report in reports:
        report.write(settings.output / f"{report.environment.num_target_layers}-layers")
    acceptance = settings.output / f"{depth}-layers" / "acceptance.png"
    console.print(f"Acceptance by depth: {acceptance}\nDrafter: {folder}", soft_wrap=True)
    return DemoResult(reports, folder, acceptance)


def results_table(reports: Sequence[Report]) -> Table:
    """Return a table with one row for each depth of the target, over all prompts."""
    rows = []
    for report in reports:
        overall = {row.method: row for row in report.numbers["rows"] if row.task == OVERALL}
        rows.append((report.environment, overall["plain"], overall["coral"]))
    environment = reports[0].environment
    return tabulate(f"{environment.title}, {environment.dtype}, greedy", COLUMNS, rows)


def accepted_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, call: Call) -> Text:
    """Return a prompt and its answer, in which the accepted tokens of the drafter are coloured."""
    ids = encode(prompt, tokenizer)[0].tolist()  # (length,)
    text = Text(decode(ids, tokenizer), "dim")
    pieces = decode_pieces(ids + call.tokens[0], len(ids), tokenizer)
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


def decode_pieces(tokens: list[int], start: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what each token from `start` on adds; half a character comes with its last token.

    Prefixes are compared, since a token alone may decode otherwise (Llama's loses its space).
    """
    pieces: list[str] = []
    shown = len(decode(tokens[:start], tokenizer))
    for stop in range(start + 1, len(tokens) + 1):
        complete = decode(tokens[:stop], tokenizer).rstrip(INCOMPLETE)
        pieces.append(complete[shown:])
        shown = max(shown, len(complete))
    return pieces


def decode(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of tokens, without the special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
