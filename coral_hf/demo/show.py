"""What a terminal shows of a demo: a table of the reports, and a text with its accepted tokens.

In: reports; a target, a drafter and a prompt. Out: rich's Table and Text.
"""

from collections.abc import Sequence

import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..measure.benchmark import BenchmarkReport
from ..measure.prompts import Prompt, encode
from ..measure.report import Environment, dashed
from ..measure.summary import OVERALL

ACCEPTED_STYLE = "bold green"
PROMPT_STYLE = "dim"
HEADER = ("target", "tau", "tokens/s alone", "with the drafter", "speed-up", "exact match")
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of half a character


def results_table(reports: Sequence[BenchmarkReport]) -> Table:
    """One row for each depth of the target."""
    table = Table(title=f"{reports[0].title}, {reports[0].environment.dtype}, greedy")
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="left" if index == 0 else "right")
    for report in reports:
        table.add_row(*result_cells(report))
    return table


def result_cells(report: BenchmarkReport) -> tuple[str, ...]:
    """The cells of one report, over all prompts."""
    overall = {row.method: row for row in report.rows if row.group == OVERALL}
    plain, coral = overall["plain"], overall["coral"]
    return (
        depth_name(report.environment),
        dashed("{:.2f}", coral.tau_per_token),
        f"{plain.tokens_per_second:.1f}",
        f"{coral.tokens_per_second:.1f}",
        f"{coral.speedup:.2f}x",
        dashed("{:.1%}", coral.exact_match),
    )


def depth_name(environment: Environment) -> str:
    """How deep the target is, and how much of it is padding."""
    depth, padded = environment.num_target_layers, environment.num_padded_layers
    return f"{depth} layers, {padded} of them padding" if padded else f"{depth} layers, its own"


def accepted_text(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_new_tokens: int,
) -> Text:
    """A prompt and its continuation, the drafter's accepted tokens coloured."""
    ids = encode(prompt, tokenizer).to(target.device)  # (1, length)
    out = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        assistant_model=drafter,
        speculation="always",
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0].tolist()
    is_accepted = accepted_tokens(out.stats.round_lengths)
    text = Text(decode(tokens[: ids.shape[1]], tokenizer), PROMPT_STYLE)
    pieces = decode_pieces(tokens, ids.shape[1], tokenizer)
    for piece, is_drafted in zip(pieces, is_accepted, strict=True):
        text.append(piece, ACCEPTED_STYLE if is_drafted else "not dim")
    return text


def accepted_tokens(round_lengths: Sequence[int]) -> list[bool]:
    """Which new tokens the drafter had proposed.

    pass            0 (prefill)   1            2        3
    emitted         x0            x1 x2 x3     x4       x5 x6
    proposed        –             x1 x2        –        x5       the last of a pass is the target's
    """
    return [False, *(i < length for length in round_lengths for i in range(1, length + 1))]


def decode_pieces(tokens: list[int], start: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token from `start` on adds; half a character comes with its last token.

    Prefixes are compared, since a token alone may decode otherwise (Llama's loses its space).
    """
    texts = [decode(tokens[:stop], tokenizer) for stop in range(start, len(tokens) + 1)]
    pieces, shown = [], len(texts[0])
    for text in texts[1:]:
        complete = text.rstrip(INCOMPLETE)
        pieces.append(complete[shown:])
        shown = max(shown, len(complete))
    return pieces


def decode(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens, without the special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
