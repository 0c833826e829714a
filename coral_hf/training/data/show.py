"""A viewer of the loss mask: which tokens of a row are trained.

In: rows of any layout, a tokenizer. Out: text on a terminal, in colour or, through a pipe, with
marks that say the same.
"""

from collections.abc import Iterable, Sequence
from functools import partial

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .encoding import IGNORED, encode
from .layouts import Row

# two shades of each kind, in turn, so that neighbouring tokens are distinguishable
TRAINED = ("black on green3", "black on pale_green1")
UNTRAINED = ("white on grey15", "white on grey27")
OPENING, CLOSING, BOUNDARY = "⟦", "⟧", "│"
PART_OF_CHARACTER, NO_TEXT = "…", "∅"


# a token as a reader sees it: its text, whether it is trained, whether it is special
Piece = tuple[str, bool, bool]
LEGEND = [("trained", True, False), (" not trained ", False, False), ("<special>", False, True)]


def show(
    rows: Iterable[tuple[int, Row]],
    tokenizer: PreTrainedTokenizerBase,
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
    write(_render(LEGEND, has_marks).append("  ↵ a line break  … a part of the next character"))
    counts = []
    for number, row in rows:
        try:
            parts = _pieces(row, tokenizer, max_length)
        except ValueError as error:
            write(Text(f"\nRow {number} cannot be read: {error}", style="red"))
            continue
        for part, (pieces, num_lost) in enumerate(parts, start=1):
            counts.append((len(pieces), sum(is_trained for _, is_trained, _ in pieces)))
            name = f"{number} ({part} of {len(parts)})" if len(parts) > 1 else str(number)
            lost = f"; {num_lost} more are cut" if num_lost else ""
            write(Text(f"\nRow {name}: {_describe(*counts[-1])}{lost}", style="bold"))
            write(_render(pieces, has_marks))
    if len(counts) > 1:
        total = _describe(*map(sum, zip(*counts, strict=True)))
        write(Text(f"\n{len(counts)} rows: {total}", style="bold"))


def _describe(num_tokens: int, num_trained: int) -> str:
    share = num_trained / max(num_tokens, 1)
    return f"{num_tokens} tokens, {num_trained} trained ({share:.1%})"


def render_mask(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    has_marks: bool = False,
) -> Text:
    """Render the tokens of a row as a `rich` text, coloured by whether they are trained.

    Where it becomes several training rows, each is a paragraph.

    Args:
        row: of any layout.
        tokenizer: the target's.
        max_length: tokens after which it is cut.
        has_marks: write ⟦ ⟧ around trained tokens and │ between tokens, for where no colours are.

    Raises:
        ValueError: for a row that cannot be read.
    """
    parts = [_render(pieces, has_marks) for pieces, _ in _pieces(row, tokenizer, max_length)]
    return Text("\n").join(parts)


def _pieces(
    row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[tuple[list[Piece], int]]:
    """Split each training row of a row into its tokens, and count those beyond `max_length`."""
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} | {*tokenizer.all_special_ids}
    found = []
    for whole in encode(row, tokenizer, max_length):
        ids, labels = whole["input_ids"][:max_length], whole["labels"][:max_length]
        pieces = [
            (_visible(text), label != IGNORED, i in special)
            for i, label, text in zip(ids, labels, token_texts(ids, tokenizer), strict=True)
        ]
        found.append((pieces, len(whole["input_ids"]) - len(ids)))
    return found


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
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
        texts.append(PART_OF_CHARACTER if is_part else text)
        pending = pending if is_part else []
    return texts


def _visible(text: str) -> str:
    """Write out control characters: they would be invisible, or move the cursor."""
    letters = text.replace("\n", "↵\n")
    shown = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in letters)
    return "".join(shown) or NO_TEXT


def _render(pieces: list[Piece], has_marks: bool) -> Text:
    text, was_trained = Text(), False
    # by whether the token before is trained, and this one
    marks = {(False, True): BOUNDARY + OPENING, (True, False): CLOSING}
    for index, (shown, is_trained, is_special) in enumerate(pieces):
        if has_marks:
            mark = marks.get((was_trained, is_trained), BOUNDARY)
            text.append(mark if index else mark.removeprefix(BOUNDARY))
        shade = (TRAINED if is_trained else UNTRAINED)[index % 2]
        text.append(shown, style=f"bold underline {shade}" if is_special else shade)
        was_trained = is_trained
    return text.append(CLOSING) if has_marks and was_trained else text
