"""The demo: train a small target and a drafter for it, then generate with and without the drafter.

In: DemoSettings. Out: a DemoResult; the drafter, reports and pictures in the output folder; a table
and coloured texts in the terminal. What was trained is cached, so a second run only generates.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..measure.benchmark import BenchmarkReport, run_benchmark
from ..measure.padding import pad_target
from ..measure.settings import BenchmarkSettings
from . import DemoSettings
from .corpus import held_out_prompts
from .models import own_drafter, own_target
from .show import ACCEPTED_STYLE, accepted_text, results_table

NUM_SHOWN_TEXTS = 2


class DemoResult(NamedTuple):
    """What a demo made."""

    reports: list[BenchmarkReport]  # at the target's own depth, then padded
    drafter: Path  # the folder of the drafter and the tokenizer
    acceptance: Path  # the picture of acceptance by depth
    is_newly_trained: bool  # False where the drafter is from the cache


def run_demo(settings: DemoSettings | None = None, console: Console | None = None) -> DemoResult:
    """Train what is not cached, load it back, measure it on held-out prompts and show the result.

    Args:
        settings: the defaults where None: no network, at most six minutes on two CPU cores the
            first time, one minute from the cache.
        console: where tables and texts go; the terminal if None.
    """
    settings, console = settings or DemoSettings(), console or Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = settings.target or str(own_target(settings, device, console.rule).folder)
    target = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(device.type).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    targets = with_padded(target, settings.pad_layers)

    trained = own_drafter(settings, source, target, tokenizer, console.rule)
    folder = settings.output / "drafter"
    shutil.copytree(trained.folder, folder, dirs_exist_ok=True)
    drafter = AutoModel.from_pretrained(folder, dtype=target.dtype).to(device)

    prompts = held_out_prompts(settings)
    console.rule(f"{len(prompts)} held-out prompts, {settings.max_new_tokens} new tokens each")
    measured = BenchmarkSettings(max_new_tokens=settings.max_new_tokens, seed=settings.seed)
    reports = [run_benchmark(one, drafter, tokenizer, prompts, measured) for one in targets]
    for prompt in prompts[:NUM_SHOWN_TEXTS]:
        console.print(accepted_text(target, drafter, tokenizer, prompt, settings.max_new_tokens))
        console.rule(Text("coloured: proposed by the drafter, accepted", ACCEPTED_STYLE))
    console.print(results_table(reports))
    acceptance = write_reports(reports, settings.output)
    console.print(f"Acceptance by depth: {acceptance}\nDrafter: {folder}", soft_wrap=True)
    return DemoResult(reports, folder, acceptance, trained.is_new)


def with_padded(target: PreTrainedModel, num_layers: int) -> list[PreTrainedModel]:
    """A target and, unless it is that deep already, the same one padded to `num_layers`."""
    if target.config.get_text_config().num_hidden_layers >= num_layers:
        return [target]
    return [target, pad_target(target, num_layers)]


def write_reports(reports: list[BenchmarkReport], output: Path) -> Path:
    """A folder of files for each depth; returns the first one's picture of acceptance by depth."""
    folders = [output / f"{report.environment.num_target_layers}-layers" for report in reports]
    for report, folder in zip(reports, folders, strict=True):
        report.write(folder)
    return folders[0] / "acceptance.png"
