"""The loss mask of rows, to look at before a training: which tokens are trained.

In: rows of any layout, a tokenizer. Out: text on a terminal, in colour or, through a pipe, with
marks that say the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .encoding import encode
from .messages import Row
from .pieces import Piece, read_pieces

# two shades of each kind, in turn, so that neighbouring tokens can be told apart
TRAINED = ("black on green3", "black on pale_green1")
UNTRAINED = ("white on grey15", "white on grey27")
OPENING, CLOSING, BOUNDARY = "⟦", "⟧", "│"


class MaskCount(NamedTuple):
    """How much of a row, or of several, is trained."""

    num_tokens: int = 0
    num_trained: int = 0

    def __str__(self) -> str:
        share = self.num_trained / max(self.num_tokens, 1)
        return f"{self.num_tokens} tokens, {self.num_trained} trained ({share:.1%})"


def show(
    rows: Iterable[tuple[int, Row]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    console: Console | None = None,
) -> MaskCount:
    """Print which tokens of some rows are trained, with a legend and counts.

    A row that cannot be read is printed with its error, and the next one follows.

    Args:
        rows: rows with their numbers, such as `enumerate(dataset)`.
        tokenizer: the target's.
        max_length: tokens after which rows are cut; whole rows by default.
        console: where to; standard output by default. Without colours, marks stand for them.

    Returns:
        The count of all rows.

    Example:

    ```python
    >>> show(enumerate(load_conversations("conversations.jsonl").select(range(3))), tokenizer)
    ```
    """
    console = Console(highlight=False) if console is None else console
    has_marks = console.no_color or console.color_system is None
    console.print(_legend(has_marks), soft_wrap=True)
    counts = []
    for number, row in rows:
        try:
            pieces, num_lost = _pieces(row, tokenizer, max_length)
        except ValueError as error:
            console.print(
                Text(f"\nRow {number} cannot be read: {error}", style="red"), soft_wrap=True
            )
            continue
        counts.append(MaskCount(len(pieces), sum(piece.is_trained for piece in pieces)))
        lost = f"; {num_lost} more are cut" if num_lost else ""
        console.print(Text(f"\nRow {number}: {counts[-1]}{lost}", style="bold"), soft_wrap=True)
        console.print(_render(pieces, has_marks), soft_wrap=True)
    total = MaskCount(sum(c.num_tokens for c in counts), sum(c.num_trained for c in counts))
    if len(counts) > 1:
        console.print(Text(f"\n{len(counts)} rows: {total}", style="bold"), soft_wrap=True)
    return total


def render_mask(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    has_marks: bool = False,
) -> Text:
    """The tokens of a row as a text of rich, coloured by whether they are trained.

    Args:
        row: of any layout.
        tokenizer: the target's.
        max_length: tokens after which it is cut.
        has_marks: write ⟦ ⟧ around trained tokens and │ between tokens, for where no colours are.

    Raises:
        ValueError: for a row that cannot be read.
    """
    return _render(_pieces(row, tokenizer, max_length)[0], has_marks)


def _pieces(
    row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[list[Piece], int]:
    """The tokens of a row up to `max_length`, and how many more it has."""
    whole = encode(row, tokenizer)
    ids, labels = whole["input_ids"][:max_length], whole["labels"][:max_length]
    return read_pieces(ids, labels, tokenizer), len(whole["input_ids"]) - len(ids)


def _render(pieces: list[Piece], has_marks: bool) -> Text:
    text, was_trained = Text(), False
    for index, piece in enumerate(pieces):
        if has_marks:
            turned = {(False, True): OPENING, (True, False): CLOSING}
            if index and not (was_trained and not piece.is_trained):
                text.append(BOUNDARY)
            text.append(turned.get((was_trained, piece.is_trained), ""))
        text.append(piece.text, style=_style(piece, index))
        was_trained = piece.is_trained
    return text.append(CLOSING) if has_marks and was_trained else text


def _style(piece: Piece, index: int) -> str:
    shade = (TRAINED if piece.is_trained else UNTRAINED)[index % 2]
    return f"bold underline {shade}" if piece.is_special else shade


def _legend(has_marks: bool) -> Text:
    if has_marks:
        return Text(
            f"{OPENING}trained{CLOSING} not trained; {BOUNDARY} between tokens, ↵ a line break,"
            " … a part of the next character"
        )
    examples = (
        Piece("trained", True, False),
        Piece("not trained", False, False),
        Piece("<special>", False, True),
    )
    text = Text()
    for piece in examples:
        text.append(piece.text, style=_style(piece, 0)).append(" ")
    for index, word in enumerate(("one", " shade", " a", " token")):
        text.append(word, style=TRAINED[index % 2])
    return text.append("  ↵ a line break  … a part of the next character")
