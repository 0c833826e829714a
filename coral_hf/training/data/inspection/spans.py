"""What each token of a training row is: read, trained, a thought, a tool call, or cut.

In: a row of `encode`, a tokenizer. Out: tokens as a reader sees them, or spans of one kind.

    <user> hi <bot> <think> hm </think> yes <end>
    read ........... thought .......... answer .
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..conversation import Encoded
from ..encoding import IGNORED

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
PART_OF_CHARACTER = "…"


class Piece(NamedTuple):
    """A token as a reader sees it."""

    text: str
    kind: str
    is_special: bool


def pieces(
    whole: Encoded, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[Piece]:
    """Return the tokens of a training row that is not cut yet, each with its kind.

    Thoughts and calls are found by the marks around them in what is trained.
    """
    ids, labels = whole["input_ids"], whole["labels"]
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} | {*tokenizer.all_special_ids}
    texts, kinds = token_texts(ids, tokenizer), list[str]()
    for is_trained, group in groupby(range(len(ids)), key=lambda i: labels[i] != IGNORED):
        places = [*group]
        part = [texts[i] for i in places]
        kinds += kinds_of(part) if is_trained else [READ] * len(places)
    size = len(ids) if max_length is None else max_length
    kinds[size:] = [CUT] * len(kinds[size:])
    return [Piece(t, k, i in special) for t, k, i in zip(texts, kinds, ids, strict=True)]


def kinds_of(texts: Sequence[str]) -> list[str]:
    """Return the kind of each token of an answer, of their texts."""
    whole = "".join("" if text == PART_OF_CHARACTER else text for text in texts)
    found = [(THOUGHT, one.span()) for one in THOUGHTS.finditer(whole)]
    thoughts = [span for _, span in found]
    for one in CALLS.finditer(whole):
        if not any(start <= one.start() < stop for start, stop in thoughts):
            found.append((CALL, one.span()))
    kinds, place = [], 0
    for text in texts:
        inside = (kind for kind, (start, stop) in found if start <= place < stop)
        kinds.append(next(inside, ANSWER))
        place += 0 if text == PART_OF_CHARACTER else len(text)
    return kinds


def spans(found: Sequence[Piece]) -> Iterator[dict[str, Any]]:
    """Yield tokens of one kind that follow each other: kind, `tokens` from and to, text."""
    start = 0
    for kind, group in groupby(found, key=lambda piece: piece.kind):
        parts = [*group]
        text = "".join(piece.text for piece in parts if piece.text != PART_OF_CHARACTER)
        yield {"kind": kind, "tokens": [start, start + len(parts)], "text": text}
        start += len(parts)


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
