"""Token ids and labels of a row; a label is -100 where nothing is trained.

In: a row and the target's tokenizer. Out: training rows of `input_ids`, `attention_mask`, `labels`,
each (length,); several of a long text. A conversation is one where one rendering of it holds each
prompt, as the target would be asked, and each answer. Else it is a row an answer:

    prompt   <user> hello <assistant> <think>        rendered with add_generation_prompt=True
    answer   a greeting </think> good morning <end>  the turn, as the template or the row writes it
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from ...identity import short_hash
from .messages import TOKEN_MASKS, Row, check_unread, is_plain_text, layout_of, read_text
from .turns import RenderedChat, Turn

Encoded = dict[str, list[int]]  # `input_ids` and `labels`, each (length,)
Offsets = Sequence[tuple[int, int]]  # (length, 2), where each token begins and ends in the text

IGNORED = -100  # the label that cross entropy and the trainer's count of items skip
TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "token_type_ids", "special_tokens_mask")
# with it a template itself marks what the target writes
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def tokenize(row: Row, tokenizer: Tokenizer, max_length: int) -> list[Encoded]:
    """Turn a row into training rows of `input_ids`, `attention_mask`, `labels`, each (length,).

    Of conversations the assistant's tokens are trained (all or none is an error), of plain text all
    tokens, of `input_ids` those with a label (without padding). The label of all others is -100.
    A text longer than `max_length` is split into rows; of others the first `max_length` are kept.

    Raises:
        ValueError: for a row that cannot be read, or that the chat template cannot render.
    """
    return [cut(one, max_length) for one in encode(row, tokenizer, max_length)]


def cut(encoded: Encoded, max_length: int) -> Encoded:
    """Cut a row of `encode` to its first `max_length` tokens, and add their mask."""
    ids = encoded["input_ids"][:max_length]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": encoded["labels"][: len(ids)],
    }


def encode(
    row: Row, tokenizer: Tokenizer, max_length: int | None = None, vocab_size: int | None = None
) -> list[Encoded]:
    """Turn a row into training rows of `input_ids` and `labels`, each (length,).

    Plain text is split into rows of `max_length`; others are whole. Ids beyond `vocab_size` are an
    error.
    """
    layout = layout_of(row)
    if is_plain_text(row):
        found = split_text(_encode_text(row, tokenizer), tokenizer.bos_token_id, max_length)
    elif layout == "token_rows":
        found = _encode_token_rows(row, tokenizer)
    elif layout == "input_ids":
        found = [_encode_ids(row)]
    else:
        found = Chat(row, tokenizer).encode()
    # A drafter reads a token and the feature before it; nothing predicts the first two tokens.
    # position        0      1        2        3
    # token           x0     x1       x2       x3
    # feature         f0     f1       f2       f3       f_i has read x_0 .. x_i
    # drafter reads          (x1,f0)  (x2,f1)  (x3,f2)  and predicts x2, x3, x4
    # label           -100   -100     x2       x3
    for one in found:
        check_ids(one["input_ids"], vocab_size or math.inf)
        one["labels"] = [IGNORED, IGNORED, *one["labels"][2:]][: len(one["input_ids"])]
    return found


def _encode_token_rows(row: Row, tokenizer: Tokenizer) -> list[Encoded]:
    """Read what the target read and wrote, as `regenerate` keeps it: nothing is rendered."""
    if row["token_rows"][0].get("tokenizer") not in (None, short_hash(tokenizer)):
        raise ValueError("`token_rows` were written with another tokenizer; pass it, or drop them.")
    return [_encode_ids(part) for part in row["token_rows"]]


def _encode_ids(row: Row) -> Encoded:
    """Read tokens but for padding; trained are those with a label that every mask keeps."""
    check_unread(row, [*TOKEN_COLUMNS, *TOKEN_MASKS], None)
    ids, ones = row["input_ids"], [1] * len(row["input_ids"])
    names = ("labels", "attention_mask", *TOKEN_MASKS)
    given = {name: row[name] for name in names if row.get(name) is not None}
    for name, values in given.items():
        labels = values if name == "labels" else ids
        is_shifted = any(b not in (a, IGNORED) for a, b in zip(ids, labels, strict=False))
        if len(values) != len(ids) or is_shifted:
            raise ValueError(
                f"{len(ids)} `input_ids` have {len(values)} in `{name}`; each needs one, and a"
                " label is its own token (unshifted) or -100."
            )
    labels, is_real = given.pop("labels", ids), given.pop("attention_mask", ones)
    kept = [*map(all, zip(ones, *given.values(), strict=True))]
    real = [i for i in range(len(ids)) if is_real[i]]
    labels = [labels[i] if kept[i] else IGNORED for i in real]
    return {"input_ids": [ids[i] for i in real], "labels": labels}


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


def _encode_text(row: Row, tokenizer: Tokenizer) -> Encoded:
    """Encode a text, or a prompt and its completion, of which the prompt is not trained."""
    prompt, text = read_text(row)
    read = text_ids(prompt, tokenizer) if prompt else []
    ids = text_ids(prompt + text, tokenizer)
    if ids[: len(read)] != read:  # a token spans both: the target writes others
        ids = [*read, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    eos = tokenizer.eos_token_id
    while eos is not None and len(ids) > len(read) and ids[-1] == eos:
        ids = ids[:-1]  # of the text or of the tokenizer
    ids = ids if eos is None or row.get("is_complete") is False else [*ids, eos]
    return {"input_ids": ids, "labels": [IGNORED] * len(read) + ids[len(read) :]}


def text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
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
    row = np.asarray(ids)
    if len(outside := row[(row < 0) | (row >= vocab_size)]):
        what = f"{where}`input_ids` has {outside[0]}, outside the target's vocabulary of"
        raise ValueError(f"{what} {vocab_size} tokens; encode it with the target's own tokenizer.")


class Chat(RenderedChat):
    """A conversation that is tokenized; see [`RenderedChat`]."""

    def __init__(self, row: Row, tokenizer: Tokenizer):
        if not tokenizer.is_fast:
            raise ValueError("Conversations need a fast tokenizer; load one, or give `text` rows.")
        super().__init__(row, tokenizer)
        self.tokenizer = tokenizer
        self.has_blocks = bool(GENERATION_BLOCK.search(self.template))
        self._special = {*tokenizer.added_tokens_decoder}

    def encode(self) -> list[Encoded]:
        """Return the training rows, one where that is exact."""
        whole = self._encode_whole()
        apart = (self._encode_turn(turn) for turn in self.turns if turn.is_trained)
        found = [whole] if whole else [*apart] or [{"input_ids": [], "labels": []}]
        trained = [label != IGNORED for one in found for label in one["labels"]]
        if (trained and all(trained)) or not (any(trained) or self.is_weighted):
            roles = [turn["role"] for turn in self.messages]
            raise ValueError(
                f"{'Every' if any(trained) else 'No'} token of {roles} is trained; expected the"
                " answers' alone. Drop rows without prompt or answer with `dataset.filter`, or"
                " enclose only the answers in the template in `{% generation %}`."
            )
        return found

    def _encoded(self, text: str) -> Any:
        """Tokenize a text as `apply_chat_template` does: its `input_ids` and `offset_mapping`."""
        # not verbose: a warning of the length would come before the cut to `max_length`
        options = {"return_offsets_mapping": True, "verbose": False}
        return self.tokenizer(text, add_special_tokens=False, **options)

    def _encode_whole(self) -> Encoded | None:
        """Encode the whole conversation as one row; None where a part of it would be another.

        Parts are prompts and answers, as texts and as tokens.
        """
        text = self.text(self.messages)
        known = (t.options is not None and text.startswith(t.prompt + t.answer) for t in self.turns)
        if not all(known):
            return None
        full = self.tokens(self.messages) if self.has_blocks else self._encoded(text)
        ids, offsets = full["input_ids"], full["offset_mapping"]
        mask, length = [False] * len(ids), len(ids)
        for turn in self.turns:
            seam, stop = len(turn.prompt), len(turn.prompt + turn.answer)
            start = self._tokens_before(seam, text, ids, offsets)
            end, is_whole = boundary(stop, offsets)
            if start is None or (self.is_complete and not is_whole):
                return None
            mask[start:end] = [turn.is_trained] * (end - start)
            length = length if self.is_complete else end
        if self.has_blocks:
            # where no weight concerns a turn, the template's marks count
            on, blocks = all(turn.is_trained for turn in self.turns), full["assistant_masks"]
            mask = [bool(b) and (on or m) for b, m in zip(blocks, mask, strict=True)]
        return labelled(ids[:length], mask[:length])

    def _tokens_before(self, seam: int, text: str, ids: list[int], offsets: Offsets) -> int | None:
        """Count the tokens of a prompt, the first `seam` characters; None if they are other ones.

        Special tokens are tokenized apart, so only what follows the last of them is compared.
        """
        number, is_whole = boundary(seam, offsets)
        if not is_whole:
            return None
        last = next((i for i in reversed(range(number)) if ids[i] in self._special), 0)
        tail = text[offsets[last][0] : seam] if number else text[:seam]
        return number if self._encoded(tail)["input_ids"] == ids[last:number] else None

    def _encode_turn(self, turn: Turn) -> Encoded:
        """Encode the prompt and the answer of one turn."""
        seam, written = len(turn.prompt), turn.empty + turn.answer
        full = self._encoded(turn.prompt + written)
        ids, offsets = full["input_ids"], full["offset_mapping"]
        start = self._tokens_before(seam, turn.prompt + written, ids, offsets)
        mask = [1] * len(ids)
        if start is None:  # a token spans both: the target writes others
            prompt, after = self._encoded(turn.prompt)["input_ids"], self._encoded(written)
            apart = [*prompt, *after["input_ids"]]
            if self.tokenizer.decode(apart) != self.tokenizer.decode(ids):
                what = f"The tokens of turn {turn.position} are others after its prompt"
                raise ValueError(f"{what}; let the target answer itself (`coral-hf regenerate`).")
            start = len(prompt) + boundary(len(turn.empty), after["offset_mapping"])[0]
            ids, mask = apart, [1] * len(apart)
        elif turn.empty:
            start = boundary(seam + len(turn.empty), offsets)[0]
        elif self.has_blocks and turn.options is not None and self.is_complete:
            turns = self.messages[: turn.position + 1]
            blocks = self.tokens(turns, **turn.options)["assistant_masks"]
            mask = blocks if len(blocks) == len(ids) else mask
        return labelled(ids, [bool(on) and i >= start for i, on in enumerate(mask)])


def labelled(ids: list[int], is_trained: Sequence[bool]) -> Encoded:
    """Label those tokens, (length,), that are trained."""
    labels = [token if on else IGNORED for token, on in zip(ids, is_trained, strict=True)]
    return {"input_ids": ids, "labels": labels}


def boundary(place: int, offsets: Offsets) -> tuple[int, bool]:
    """Count the tokens that end before a place in a text, and tell whether none spans it."""
    number = bisect_right(offsets, place, key=lambda token: token[1])
    return number, all(start >= place for start, _ in offsets[number : number + 1])
