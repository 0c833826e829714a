"""The tokens of a row as a reader sees them, one piece of text a token.

In: `input_ids` and `labels`, the tokenizer. Out: a list of Piece, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .encoding import IGNORED

PART_OF_CHARACTER = "…"
NO_TEXT = "∅"


class Piece(NamedTuple):
    """One token."""

    text: str  # what it adds to the text; control characters are written out
    is_trained: bool
    is_special: bool


def read_pieces(
    ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Piece]:
    """The pieces of a row, each with its mask.

    Args:
        ids, labels: (length,); a label of -100 is not trained.
        tokenizer: that of the ids.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} | set(tokenizer.all_special_ids)
    texts = _texts(ids, tokenizer)
    return [
        Piece(visible(text), label != IGNORED, i in special)
        for i, label, text in zip(ids, labels, texts, strict=True)
    ]


def _texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds; of a character of several tokens, the last one has it."""

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    # many decoders drop the space that opens a text, so none of our tokens stands at its start
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    opening, pending, texts = decode(anchor), list[int](), list[str]()
    for i in ids:
        pending.append(i)
        text = decode([*anchor, *pending]).removeprefix(opening)
        # no character has more than four bytes
        if text.endswith("\ufffd") and len(pending) < 4:
            texts.append(PART_OF_CHARACTER)
        else:
            texts.append(text)
            pending = []
    return texts


def visible(text: str) -> str:
    """A text without control characters: they would be invisible, or move the cursor."""
    if not text:
        return NO_TEXT
    return "".join(
        "↵\n" if letter == "\n" else letter if letter.isprintable() else _escaped(letter)
        for letter in text
    )


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
