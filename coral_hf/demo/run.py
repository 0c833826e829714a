"""The demo: train a small target and a drafter for it, then generate with and without the drafter.

In: DemoSettings. Out: reports; models and reports in the output folder; results and coloured
answers in the terminal. Models that the folder holds are not trained again.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from rich import get_console
from rich.table import Table
from rich.text import Text
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..atomic import write_text
from ..identity import weights_digest
from ..measure.benchmark import num_same, run_benchmark
from ..measure.padding import pad_target, shown_depth
from ..measure.prompts import Prompt, encode
from ..measure.report import Report, dashed
from ..measure.settings import TREE, BenchmarkSettings
from ..measure.terminal import coloured_text, legend, unlogged
from . import DemoSettings
from .models import DEVICE, kept, train_drafter, train_target
from .stories import held_out_prompts, stories

MORE_STORIES = 1000  # for the reader's own next steps
# of a report's environment, and its numbers for the target alone and with the drafter
RESULT = (
    "{1.tokens_per_second:.1f} tokens/s alone (eager), {2.tokens_per_second:.1f} with the drafter;"
    " {2.tau_per_token:.2f} tokens a round"
)
LEFT_ALONE = """\
So few layers are left alone: with speculation="never" they decode at their own speed."""
NEXT = """\
The same two models in a browser, with prompts of your own (pip install gradio):
  {}
Next, with a model of your own and conversations or text like what it shall write:
  coral-hf train --target MODEL --dataset FILE --output my-drafter
  coral-hf verify --target MODEL --drafter my-drafter
  coral-hf generate --target MODEL --drafter my-drafter "Tell me a story."
"""


def run_demo(settings: DemoSettings) -> list[Report]:
    """Train what is not there yet, load it, measure it on held-out prompts and show the result.

    With the default settings it takes less than five minutes on two CPU cores the first time, and
    less than one after that; and no network.

    Returns:
        The reports at the target's own depth, and padded.

    Raises:
        ValueError: if the output folder holds models that were trained with other settings.
    """
    console = get_console()
    source = kept(settings, "target", partial(train_target, settings))
    target = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(DEVICE).eval()
    target.requires_grad_(False)  # as training leaves it, so that later runs find its graphs
    tokenizer = AutoTokenizer.from_pretrained(source)
    train = partial(train_drafter, settings, target, tokenizer)
    folder = kept(settings, "drafter", train, target=weights_digest(target))
    more, _ = stories(settings.seed + 1, MORE_STORIES, 0)
    write_text(settings.output / "stories.txt", "\n\n".join(more))
    drafter = AutoModel.from_pretrained(folder, dtype=target.dtype).to(DEVICE)

    prompts = held_out_prompts(settings)
    own = BenchmarkSettings(
        **dict[str, Any](zip(TREE, settings.tree, strict=True)),
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        speculation="always",
    )
    deep = replace(own, compile=settings.compile, warmup=0)  # the machine is warm by then
    reports = []
    for model, chosen in ((target, own), (pad_target(target, settings.pad_layers), deep)):
        layers = model.config.num_hidden_layers
        said = f"Measuring {len(prompts)} held-out prompts with {layers} layers"
        with unlogged("measure.benchmark"), console.status(said):
            reports.append(run_benchmark(model, drafter, tokenizer, prompts, chosen))
    for report in reports:
        without_plots = replace(report, figures={})  # which take seconds
        without_plots.write(settings.output / f"{report.environment.num_target_layers}-layers")
    for prompt in prompts[:2]:
        console.print(side_by_side(reports[-1], tokenizer, prompt))
    if console.color_system and not console.no_color:
        console.print(legend())
    for report in reversed(reports):
        console.rule()
        console.print(headline(report), style="bold", highlight=False)
        console.print(dashed(RESULT, report.environment, *report.numbers["rows"][-2:]))
        if (seconds := report.environment.compile_seconds) is not None:
            console.print(f"Its rounds were compiled ahead, in {seconds:.0f} s.")
        if report.numbers["rows"][-1].speedup < 1:
            console.print(LEFT_ALONE, highlight=False)
    console.rule()
    console.print(f"Models and reports are in {settings.output}.", soft_wrap=True)
    page = "coral-hf playground"
    if settings.output != DemoSettings.output:
        page += f" --target {source} --drafter {folder} --pad-layers {settings.pad_layers}"
    console.print(NEXT.format(page), highlight=False, soft_wrap=True)
    return reports


def side_by_side(report: Report, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Table:
    """Return a prompt and its answers: the target's alone, and with the drafter, coloured."""
    calls = {call.method: call for call in report.calls if call.prompt == prompt.id}
    text = tokenizer.decode(encode(prompt, tokenizer)[0], skip_special_tokens=True)
    table = Table("alone", "with the drafter", title=Text(text, "dim"), title_justify="left")
    plain, coral = calls["plain"].tokens[0], calls["coral"]
    drafted = coloured_text(tokenizer, coral.tokens[0], coral.round_lengths)
    table.add_row(coloured_text(tokenizer, plain), drafted)
    return table


def headline(report: Report) -> str:
    """Say how much faster the target is with the drafter, and how much of its text is the same."""
    environment, row = report.environment, report.numbers["rows"][-1]  # over all prompts
    plain, coral = (
        [call.tokens[0] for call in report.calls if call.method == name]
        for name in ("plain", "coral")
    )
    same, total = sum(map(num_same, plain, coral)), sum(map(len, plain))
    speed = f"{row.speedup:.1f}x faster" if row.speedup > 1.05 else f"{row.speedup:.2f}x the speed"
    layers = shown_depth(environment.num_target_layers, environment.num_padded_layers)
    return f"{speed}, the same {same} of {total} tokens ({layers})"
