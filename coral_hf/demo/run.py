"""The demo: train a small target and a drafter for it, then generate with and without the drafter.

In: DemoSettings. Out: reports; models, reports and plots in the output folder; results and coloured
answers in the terminal. Models that the folder holds are not trained again.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from rich import get_console
from rich.text import Text
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..identity import digest, weights_digest
from ..measure.benchmark import run_benchmark
from ..measure.calls import Call
from ..measure.chat import set_chat_options
from ..measure.padding import pad_target
from ..measure.prompts import Prompt, encode
from ..measure.report import Report, dashed
from ..measure.settings import BenchmarkSettings
from ..training.data import load_conversations
from ..training.data.inspection.spans import token_texts
from . import DemoSettings
from .corpus import held_out_prompts
from .models import DEVICE, kept, train_drafter, train_target

ACCEPTED_STYLE = "bold green"
# of a report's environment, and its numbers for the target alone and with the drafter
RESULT = (
    "{0.num_target_layers} layers ({0.num_padded_layers} padding): {1.tokens_per_second:.1f}"
    " tokens/s alone, {2.tokens_per_second:.1f} with the drafter, {2.speedup:.2f}x;"
    " {2.tau_per_token:.2f} tokens a round, exact match {2.exact_match:.1%}"
)


def run_demo(settings: DemoSettings) -> list[Report]:
    """Train what is not there yet, load it, measure it on held-out prompts and show the result.

    With the default settings it takes at most six minutes on two CPU cores the first time, one
    minute after that, and the time of compiling; and no network.

    Returns:
        The reports at the target's own depth, and padded.

    Raises:
        ValueError: if the output folder holds models that were trained with other settings.
    """
    console = get_console()
    source = settings.target or kept(settings, "target", partial(train_target, settings))
    target = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(DEVICE).eval()
    given = settings.chat_template, settings.chat_template_kwargs
    tokenizer = set_chat_options(AutoTokenizer.from_pretrained(source), *given)
    train = partial(train_drafter, settings, target, tokenizer)
    read = {"target": weights_digest(target)}
    if settings.dataset is not None:
        read["dataset"] = digest([*load_conversations(settings.dataset)])
    folder = kept(settings, "drafter", train, **read)
    drafter = AutoModel.from_pretrained(folder, dtype=target.dtype).to(DEVICE)

    prompts = held_out_prompts(settings)
    console.rule(f"{len(prompts)} held-out prompts, {settings.max_new_tokens} new tokens each")
    measured = BenchmarkSettings(max_new_tokens=settings.max_new_tokens, seed=settings.seed)
    reports = [run_benchmark(target, drafter, tokenizer, prompts, measured)]
    if target.config.get_text_config().num_hidden_layers < settings.pad_layers:
        padded = pad_target(target, settings.pad_layers)
        if settings.compile:
            console.print("Compiling rounds of constant shapes …")
            depth, top_k, nodes = settings.compiled_tree
            measured = replace(
                measured, compile=True, tree_depth=depth, tree_top_k=top_k, tree_nodes=nodes
            )
        reports.append(run_benchmark(padded, drafter, tokenizer, prompts, measured))
    answers = {call.prompt: call for call in reports[0].calls if call.method == "coral"}
    for prompt in [prompt for prompt in prompts if prompt.id in answers][:2]:
        console.print(accepted_text(tokenizer, prompt, answers[prompt.id]))
        console.rule(Text("coloured: proposed by the drafter, accepted", ACCEPTED_STYLE))
    for report in reports:
        report.write(settings.output / f"{report.environment.num_target_layers}-layers")
        plain, coral = report.numbers["rows"][-2:]  # over all prompts
        console.print(dashed(RESULT, report.environment, plain, coral))
        if (seconds := report.environment.compile_seconds) is not None:
            console.print(f"Its rounds were compiled ahead, in {seconds:.0f} s.")
    console.print(f"Models, reports and plots are in {settings.output}.", soft_wrap=True)
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
