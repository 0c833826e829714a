"""A viewer of training rows: which tokens are trained, and what they are.

In: rows of any layout, a tokenizer. Out: text on a terminal, in colour or, through a pipe, with
marks that say the same; or a JSON object for each training row, with spans of one kind.

    <user> hi <bot> <think> hm </think> yes <end>
    read ........... thought .......... answer .
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase as Tokenizer

from .encoding import IGNORED, Encoded, encode
from .messages import Row, layout_of


class Piece(NamedTuple):
    """A token as a reader sees it."""

    text: str  # empty for the first tokens of a character of several
    kind: str
    is_special: bool = False


READ, ANSWER, THOUGHT, CALL, CUT = "read", "answer", "thought", "tool_call", "cut"
NAMES = r"(\w*think\w*|reasoning|thought)"
# a thought ends with its mark or with the answer; one that the prompt opens begins with the answer
THOUGHTS = re.compile(
    rf"<(?P<mark>{NAMES})>.*?(?:</(?P=mark)>|\Z)"
    rf"|\A(?:(?!<{NAMES}>).)*</{NAMES}>"
    r"|\[THINK\].*?(?:\[/THINK\]|\Z)"
    r"|<\|channel\|>analysis.*?(?:<\|end\|>|\Z)",
    re.DOTALL,
)
CALLS = re.compile(
    r"<(?P<mark>tool_calls?|function_calls?)>(?:.*</(?P=mark)>|.*)"
    r"|<function=(?:.*</function>|.*)"
    r"|<[|｜]tool[_▁]calls?[^|｜]*[|｜]>(?:.*<[|｜]tool[_▁]calls?[_▁]end[|｜]>|.*)"
    r"|(?:\[TOOL_CALLS\]|<\|python_tag\|>|<\|action_start\|>).*"
    r"|<\|channel\|>commentary to=(?:.*?<\|call\|>|.*)",
    re.DOTALL,
)
# two shades of each kind, in turn, so that neighbouring tokens are distinguishable
SHADES = {
    READ: ("white on grey15", "white on grey27"),
    ANSWER: ("black on green3", "black on pale_green1"),
    THOUGHT: ("black on sky_blue2", "black on light_sky_blue1"),
    CALL: ("black on gold3", "black on khaki1"),
    CUT: ("strike grey50", "strike grey62"),
}
MARKS = {READ: "", ANSWER: "⟦⟧", THOUGHT: "⟪⟫", CALL: "⟨⟩", CUT: "✂✂"}
BOUNDARY, PART_OF_CHARACTER = "│", "…"  # the latter stands for a token without a text of its own
LEGEND = [Piece("trained", ANSWER), Piece(" not trained ", READ), Piece("<special>", READ, True)]
LEGEND += [Piece("thought", THOUGHT), Piece("tool call", CALL), Piece("cut", CUT)]
MOST_CUT = 40  # tokens beyond `max_length` that are printed


def show(
    rows: Iterable[tuple[int, Row]],
    tokenizer: Tokenizer,
    max_length: int | None = None,
    console: Console | None = None,
) -> None:
    """Print which tokens of some rows are trained, with a legend and counts.

    A row that cannot be read is printed with its error, and the next one follows.

    Args:
        rows: rows with their numbers, such as `enumerate(dataset)`.
        tokenizer: the target's.
        max_length: tokens after which rows are cut; whole rows by default.
        console: standard output by default. Without colours, marks stand for them.

    Example:

    ```python
    >>> show(enumerate(load_conversations("conversations.jsonl").select(range(3))), tokenizer)
    ```
    """
    console = Console(highlight=False) if console is None else console
    has_marks = console.no_color or console.color_system is None
    write = partial(console.print, soft_wrap=True)
    write(render(LEGEND, has_marks).append("  ↵ a line break  … a part of the next character"))
    counts = []
    for found, part in _read(rows, tokenizer, max_length):
        if "error" in found:
            text = f"\nRow {found['row']} cannot be read: {found['error']}"
            write(Text(text, style="red"))
            continue
        counts.append((found["num_tokens"], found["num_trained"]))
        of = f" ({found['part']} of {found['parts']})" if found["parts"] > 1 else ""
        lost = f"; {found['num_cut']} more are cut" if found["num_cut"] else ""
        write(Text(f"\nRow {found['row']}{of}: {_describe(*counts[-1])}{lost}", style="bold"))
        write(Text(f"from {found['source']}", style="dim"))
        write(render(part[: found["num_tokens"] + MOST_CUT], has_marks))
    if len(counts) > 1:
        total = _describe(*map(sum, zip(*counts, strict=True)))
        write(Text(f"\n{len(counts)} rows: {total}", style="bold"))


def describe(
    rows: Iterable[tuple[int, Row]], tokenizer: Tokenizer, max_length: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield what `show` prints as objects: a training row each, or the `error` of a row."""
    for found, part in _read(rows, tokenizer, max_length):
        start, spans = 0, list[dict[str, Any]]()
        for kind, group in groupby(part, key=lambda piece: piece.kind):
            texts = [piece.text for piece in group]
            stop = start + len(texts)
            spans.append({"kind": kind, "tokens": [start, stop], "text": "".join(texts)})
            start = stop
        yield {**found, "spans": spans}


def _read(
    rows: Iterable[tuple[int, Row]], tokenizer: Tokenizer, max_length: int | None
) -> Iterator[tuple[dict[str, Any], list[Piece]]]:
    """Yield each training row, its numbers and its tokens; or the `error` of a row."""
    for number, row in rows:
        try:
            wholes = encode(row, tokenizer, max_length).rows
        except ValueError as error:
            yield {"row": number, "error": str(error)}, []
            continue
        parts = [pieces(whole, tokenizer, max_length) for whole in wholes]
        layout = layout_of(row)
        turns = row[layout] if layout in ("messages", "conversations") else []
        roles = ", ".join(str(turn.get("role", turn.get("from"))) for turn in turns)
        source = f"`{layout}`: {roles}" if roles else f"`{layout}`"
        for index, part in enumerate(parts, start=1):
            kinds = [piece.kind for piece in part]
            num_tokens = len(kinds) - kinds.count(CUT)
            found = {"row": number, "part": index, "parts": len(parts), "source": source}
            found |= {"num_tokens": num_tokens, "num_trained": num_tokens - kinds.count(READ)}
            yield {**found, "num_cut": kinds.count(CUT)}, part


def _describe(num_tokens: int, num_trained: int) -> str:
    share = num_trained / max(num_tokens, 1)
    return f"{num_tokens} tokens, {num_trained} trained ({share:.1%})"


def _visible(text: str) -> str:
    """Write out control characters: they would be invisible, or move the cursor."""
    letters = text.replace("\n", "↵\n")
    shown = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in letters)
    return "".join(shown) or PART_OF_CHARACTER


def render(shown: list[Piece], has_marks: bool = False) -> Text:
    """Render tokens as a `rich` text, coloured by what they are, or with marks around them."""
    text, before = Text(), READ
    for index, piece in enumerate(shown):
        if has_marks:
            is_same = piece.kind == before
            closing, opening = MARKS[before][1:], MARKS[piece.kind][:1]
            between = BOUNDARY if index and (is_same or not closing) else ""
            text.append(between if is_same else closing + between + opening)
        shade = SHADES[piece.kind][index % 2]
        style = f"bold underline {shade}" if piece.is_special else shade
        text.append(_visible(piece.text), style=style)
        before = piece.kind
    return text.append(MARKS[before][1:]) if has_marks else text


def pieces(whole: Encoded, tokenizer: Tokenizer, max_length: int | None = None) -> list[Piece]:
    """Return the tokens of a training row that is not cut yet, each with its kind.

    Thoughts and calls are found by the marks around them in what is trained.
    """
    ids, labels = whole["input_ids"], whole["labels"]
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} | {*tokenizer.all_special_ids}
    texts, kinds = token_texts(ids, tokenizer), list[str]()
    for is_trained, group in groupby(range(len(ids)), key=lambda i: labels[i] != IGNORED):
        part = [texts[i] for i in group]
        kinds += kinds_of(part) if is_trained else [READ] * len(part)
    size = len(ids) if max_length is None else max_length
    kinds[size:] = [CUT] * len(kinds[size:])
    return [Piece(t, k, i in special) for t, k, i in zip(texts, kinds, ids, strict=True)]


def kinds_of(texts: Sequence[str]) -> list[str]:
    """Return the kind of each token of an answer, of their texts."""
    whole, kinds, place = "".join(texts), list[str](), 0
    found = [(THOUGHT, one.span()) for one in THOUGHTS.finditer(whole)]
    outside = THOUGHTS.sub(lambda one: "\0" * len(one[0]), whole)
    found += [(CALL, one.span()) for one in CALLS.finditer(outside)]
    for text in texts:
        inside = (kind for kind, (start, stop) in found if start <= place < stop)
        kinds.append(next(inside, ANSWER))
        place += len(text)
    return kinds


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Decode each token; a character of several tokens is the text of the last of them."""

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    # many decoders drop the space that opens a text, so none of our tokens stands at its start
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    opening, pending, texts = decode(anchor), list[int](), list[str]()
    for i in ids:
        pending.append(i)
        text = decode([*anchor, *pending]).removeprefix(opening)
        # no character has more than four bytes
        is_part = text.endswith("\ufffd") and len(pending) < 4
        texts.append("" if is_part else text)
        pending = pending if is_part else []
    return texts
