"""Token ids and labels of a row; a label is -100 where nothing is trained.

In: a row and the target's tokenizer. Out: training rows of `input_ids`, `attention_mask`, `labels`,
each (length,); several of a long text, or where a template renders turns otherwise later.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ...identity import short_hash
from .conversation import IGNORED, Chat, Encoded
from .layouts import TOKEN_MASKS, Row, check_masks, is_plain_text, layout_of, read_text
from .messages import Message

TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "token_type_ids", "special_tokens_mask")


class Encoding(NamedTuple):
    """Training rows of a row, and how the chat template behaved."""

    rows: list[Encoded]
    messages: list[Message]  # of a conversation, as the row gives them
    behaviour: list[str]


def tokenize(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """Turn a row into training rows of `input_ids`, `attention_mask`, `labels`, each (length,).

    Of conversations the assistant's tokens are trained (all or none is an error), of plain text all
    tokens, of `input_ids` those with a label (without padding). The label of all others is -100.
    A text longer than `max_length` is split into rows; of others the first `max_length` are kept.

    Raises:
        ValueError: for a row that cannot be read, or that the chat template cannot render.
    """
    return [cut(one, max_length) for one in encode(row, tokenizer, max_length).rows]


def cut(encoded: Encoded, max_length: int) -> Encoded:
    """Cut a row of `encode` to its first `max_length` tokens, and add their mask."""
    ids = encoded["input_ids"][:max_length]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": encoded["labels"][: len(ids)],
    }


def encode(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> Encoding:
    """Turn a row into training rows of `input_ids` and `labels`, each (length,).

    Plain text is split into rows of `max_length`; others are whole. Ids beyond `vocab_size` are an
    error.
    """
    layout, messages, behaviour = layout_of(row), list[Message](), list[str]()
    if is_plain_text(row):
        found = split_text(_encode_text(row, tokenizer), tokenizer.bos_token_id, max_length)
    elif layout == "token_rows":
        found = _encode_token_rows(row, tokenizer)
    elif layout == "input_ids":
        found = [_encode_ids(row)]
    else:
        chat = Chat(row, tokenizer)
        found, messages, behaviour = chat.encode(), chat.chat.given, chat.behaviour
    # A drafter reads a token and the feature before it; nothing predicts the first two tokens.
    # position        0      1        2        3
    # token           x0     x1       x2       x3
    # feature         f0     f1       f2       f3       f_i has read x_0 .. x_i
    # drafter reads          (x1,f0)  (x2,f1)  (x3,f2)  and predicts x2, x3, x4
    # label           -100   -100     x2       x3
    for one in found:
        check_ids(one["input_ids"], vocab_size or math.inf)
        one["labels"] = [IGNORED, IGNORED, *one["labels"][2:]][: len(one["input_ids"])]
    return Encoding(found, messages, behaviour)


def _encode_token_rows(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Read what the target read and wrote, as `regenerate` keeps it: nothing is rendered."""
    written_by, own = row["token_rows"][0].get("tokenizer"), short_hash(tokenizer)
    if written_by not in (None, own):
        raise ValueError(
            f"`token_rows` were written with the tokenizer {written_by}, not with this one ({own})."
            " Pass the tokenizer of their target, or drop the column, and the messages are rendered"
            " with this one."
        )
    return [_encode_ids(part) for part in row["token_rows"]]


def _encode_ids(row: Row) -> Encoded:
    ids = row["input_ids"]
    labels = ids if row.get("labels") is None else row["labels"]
    mask = [1] * len(ids) if row.get("attention_mask") is None else row["attention_mask"]
    masks = [name for name in TOKEN_MASKS if row.get(name) is not None]
    check_masks(row, [*TOKEN_COLUMNS, *TOKEN_MASKS])
    kept = [1] * len(ids)
    for name in masks:  # trained is what all of them keep
        if len(row[name]) != len(ids):
            raise ValueError(f"{len(ids)} `input_ids` have {len(row[name])} in `{name}`.")
        kept = [a and b for a, b in zip(kept, row[name], strict=True)]
    sizes = {len(ids), len(labels), len(mask)}
    if len(sizes) > 1 or any(b not in (a, IGNORED) for a, b in zip(ids, labels, strict=True)):
        raise ValueError(
            f"{len(ids)} `input_ids` have {len(labels)} `labels` and {len(mask)} in the mask; each"
            " needs one, and a label is its own token (unshifted) or -100."
        )
    labels = [label if is_kept else IGNORED for label, is_kept in zip(labels, kept, strict=True)]
    pairs = [pair for *pair, is_real in zip(ids, labels, mask, strict=True) if is_real]
    return {"input_ids": [i for i, _ in pairs], "labels": [label for _, label in pairs]}


def split_text(encoded: Encoded, bos: int | None, max_length: int | None) -> list[Encoded]:
    """Split the tokens of a text into rows of `max_length`; each token is trained in one of them.

    A row repeats what nothing predicts in it: BOS, where the text has one, and the token before.

    text, of 8, in rows of 5    <s> a b c d    <s> d e f g
    trained                         . b c d        . e f g
    """
    ids, labels = encoded["input_ids"], encoded["labels"]
    if max_length is None or len(ids) <= max_length or max_length < 3:
        return [encoded]
    opening = [] if bos is None or ids[0] != bos else [bos]
    parts, start = [{"input_ids": ids[:max_length], "labels": labels[:max_length]}], max_length
    while start < len(ids):
        before = start - 2 + len(opening)  # the first token that is repeated
        end = before + max_length - len(opening)
        part = {"input_ids": ids[before:end], "labels": labels[before:end]}
        parts.append({name: [*opening, *values] for name, values in part.items()})
        start = end
    return parts


def _encode_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode a text, or a prompt and its completion, of which the prompt is not trained."""
    prompt, text = read_text(row)
    read = _text_ids(prompt, tokenizer) if prompt else []
    ids = _text_ids(prompt + text, tokenizer)
    if ids[: len(read)] != read:  # a token spans both: the target writes others
        ids = [*read, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    eos = tokenizer.eos_token_id
    while eos is not None and len(ids) > len(read) and ids[-1] == eos:
        ids = ids[:-1]  # of the text or of the tokenizer
    ids = ids if eos is None or row.get("is_complete") is False else [*ids, eos]
    return {"input_ids": ids, "labels": [IGNORED] * len(read) + ids[len(read) :]}


def _text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a text, (length,), with one BOS, whoever writes it, and without EOS."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    while bos is not None and ids[:1] == [bos]:
        ids = ids[1:]
    while eos is not None and ids[-1:] == [eos]:
        ids = ids[:-1]
    return ids if bos is None else [bos, *ids]


def check_ids(ids: Sequence[int], vocab_size: float, where: str = "") -> None:
    """Raise a ValueError if token ids of a row, (length,), are outside the vocabulary."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        token = next(token for token in ids if not 0 <= token < vocab_size)
        raise ValueError(
            f"{where}`input_ids` has {token}, outside the target's vocabulary of {vocab_size}"
            " tokens; encode it with the target's own tokenizer."
        )
