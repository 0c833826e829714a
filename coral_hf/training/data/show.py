"""A viewer of training rows: which of their tokens are trained.

In: rows of any layout, a tokenizer. Out: text on a terminal, in colour or, through a pipe, with
marks that say the same: `<user>│hi│<bot>⟦yes│<end>⟧`.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase as Tokenizer

from .encoding import IGNORED, Encoded, encode
from .messages import Row, layout_of


class Piece(NamedTuple):
    """A token as a reader sees it."""

    text: str  # empty for the first tokens of a character of several
    is_trained: bool
    is_special: bool = False


# of what is read and of what is trained, in turn, so that neighbouring tokens are distinguishable
SHADES = [("white on grey15", "white on grey27"), ("black on green3", "black on pale_green1")]
LEGEND = [Piece("trained", True), Piece(" not trained ", False), Piece("<special>", False, True)]


def show(
    rows: Iterable[tuple[int, Row]],
    tokenizer: Tokenizer,
    max_length: int | None = None,
    console: Console | None = None,
) -> None:
    """Print which tokens of some rows are trained, and how many.

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
    for number, row in rows:
        try:
            wholes = encode(row, tokenizer, max_length)
        except ValueError as error:
            write(Text(f"\nRow {number} cannot be read: {error}", style="red"))
            continue
        for whole in wholes:
            tokens = pieces(whole, tokenizer)[:max_length]
            trained, lost = sum(t.is_trained for t in tokens), len(whole["labels"]) - len(tokens)
            shown = f"{len(tokens)} tokens, {trained} trained ({trained / max(len(tokens), 1):.1%})"
            shown += f"; {lost} more are cut" if lost else ""
            write(Text(f"\nRow {number}: {shown}", style="bold"))
            write(Text(f"from `{layout_of(row)}`", style="dim"))
            write(render(tokens, has_marks))


def render(tokens: Sequence[Piece], has_marks: bool = False) -> Text:
    """Render tokens as a `rich` text, coloured by whether they are trained, or with marks."""
    shown = Text()
    for is_trained, group in groupby(enumerate(tokens), key=lambda one: one[1].is_trained):
        texts = [
            Text(_visible(text), "bold underline " * is_special + SHADES[is_trained][i % 2])
            for i, (text, _, is_special) in group
        ]
        part = Text("│" if has_marks else "").join(texts)
        shown.append(Text.assemble("⟦", part, "⟧") if has_marks and is_trained else part)
    return shown


def pieces(row: Encoded, tokenizer: Tokenizer) -> list[Piece]:
    """Return the tokens of a training row."""
    special = tokenizer.added_tokens_decoder
    texts = token_texts(row["input_ids"], tokenizer)
    tokens = zip(texts, row["labels"], row["input_ids"], strict=True)
    return [Piece(text, label != IGNORED, i in special) for text, label, i in tokens]


def _visible(text: str) -> str:
    """Write out control characters: they would be invisible, or move the cursor."""
    letters = text.replace("\n", "↵\n")
    shown = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in letters)
    return "".join(shown) or "…"


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
