"""Training rows of a conversation that was not generated here: prompts and answers as token ids.

In: a row of turns, the target's tokenizer. Out: one training row where one rendering of the whole
conversation holds each prompt, as the target would be asked, and each answer. Else a row an answer:

    prompt   <user> hello <assistant> <think>        rendered with add_generation_prompt=True
    answer   a greeting </think> good morning <end>  the turn, as the template or the row writes it
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .layouts import Row
from .turns import RenderedChat, Turn

Encoded = dict[str, list[int]]  # `input_ids` and `labels`, each (length,)

IGNORED = -100  # the label that cross entropy and the trainer's count of items skip
# with it a template itself marks what the target writes
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Chat:
    """A conversation that is tokenized.

    Args:
        row: with turns.
        tokenizer: the target's.

    Raises:
        ValueError: for a row that cannot be read, or that the chat template cannot render.
    """

    def __init__(self, row: Row, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.is_fast:
            raise ValueError("Conversations need a fast tokenizer; load one, or give `text` rows.")
        self.tokenizer = tokenizer
        self.chat = RenderedChat(row, tokenizer)
        self.turns, self.is_complete = self.chat.turns, self.chat.is_complete
        self.has_blocks = bool(GENERATION_BLOCK.search(self.chat.template))
        self.behaviour = self.chat.behaviour()
        self._known: dict[str, list[int]] = {}  # tokens of texts that come again and again
        self._special = {*tokenizer.added_tokens_decoder}

    def encode(self) -> list[Encoded]:
        """Return the training rows, one where that is exact."""
        whole = self._encode_whole()
        if whole is not None:
            self.behaviour.append("one rendering holds every prompt and answer")
            found = [whole]
        else:
            self.behaviour.append("a training row an answer, as turns are rendered otherwise later")
            found = [self._encode_turn(turn) for turn in self.turns if turn.is_trained]
            found = found or [{"input_ids": [], "labels": []}]
        trained = [label != IGNORED for one in found for label in one["labels"]]
        if (trained and all(trained)) or not (any(trained) or self.chat.is_weighted):
            roles = [turn["role"] for turn in self.chat.messages]
            raise ValueError(
                f"{'Every' if any(trained) else 'No'} token of {roles} is trained; expected the"
                " answers' alone. Drop rows without prompt or answer with `dataset.filter`, or"
                " enclose only the answers in the template in `{% generation %}`."
            )
        return found

    def _ids(self, text: str) -> list[int]:
        """Tokenize a text, (length,), as `apply_chat_template` does."""
        if text not in self._known:
            self._known[text] = self._encoded(text)["input_ids"]
        return self._known[text]

    def _encoded(self, text: str) -> Any:
        """Tokenize a text: `input_ids` and `offset_mapping`, (length,) each."""
        # not verbose: a warning of the length would come before the cut to `max_length`
        options = {"return_offsets_mapping": True, "verbose": False}
        return self.tokenizer(text, add_special_tokens=False, **options)

    def _encode_whole(self) -> Encoded | None:
        """Encode the whole conversation as one row; None where a part of it would be another.

        Parts are prompts and answers, as texts and as tokens.
        """
        text = self.chat.text(self.chat.messages)
        known = (t.options is not None and text.startswith(t.prompt + t.answer) for t in self.turns)
        if not all(known):
            return None
        full = self.chat.tokens(self.chat.messages) if self.has_blocks else self._encoded(text)
        ids, offsets = full["input_ids"], full["offset_mapping"]
        mask = [False] * len(ids)
        length = len(ids)
        for turn in self.turns:
            seam, stop = len(turn.prompt), len(turn.prompt + turn.answer)
            start = self._tokens_before(seam, text, ids, offsets)
            end, is_whole = boundary(stop, offsets)
            if start is None or (self.is_complete and not is_whole):
                return None
            mask[start:end] = [turn.is_trained] * (end - start)
            length = length if self.is_complete else end
        if self.has_blocks:
            blocks = full["assistant_masks"]
            left_out = [t for t in self.turns if not t.is_trained]
            # of turns that no weight concerns, the template's marks count
            mask = [bool(b) and (m or not left_out) for b, m in zip(blocks, mask, strict=True)]
        labels = [i if is_trained else IGNORED for i, is_trained in zip(ids, mask, strict=True)]
        return {"input_ids": ids[:length], "labels": labels[:length]}

    def _tokens_before(
        self, seam: int, text: str, ids: list[int], offsets: Sequence[tuple[int, int]]
    ) -> int | None:
        """Count the tokens of a prompt, the first `seam` characters; None if they are other ones.

        Special tokens are tokenized apart, so only what follows the last of them is compared.
        """
        number, is_whole = boundary(seam, offsets)
        if not is_whole:
            return None
        last = next((i for i in reversed(range(number)) if ids[i] in self._special), 0)
        tail = text[offsets[last][0] : seam] if number else text[:seam]
        return number if self._ids(tail) == ids[last:number] else None

    def _encode_turn(self, turn: Turn) -> Encoded:
        """Encode the prompt and the answer of one turn."""
        seam, written = len(turn.prompt), turn.empty + turn.answer
        full = self._encoded(turn.prompt + written)
        ids, offsets = full["input_ids"], full["offset_mapping"]
        start = self._tokens_before(seam, turn.prompt + written, ids, offsets)
        mask = [1] * len(ids)
        if start is None:  # a token spans both: the target writes others
            prompt, after = self._ids(turn.prompt), self._encoded(written)
            apart = [*prompt, *after["input_ids"]]
            if self.tokenizer.decode(apart) != self.tokenizer.decode(ids):
                raise ValueError(
                    f"The tokens of turn {turn.position} are others after its prompt than in the"
                    " whole text; let the target answer itself (`coral-hf regenerate`)."
                )
            start = len(prompt) + boundary(len(turn.empty), after["offset_mapping"])[0]
            ids, mask = apart, [1] * len(apart)
        elif turn.empty:
            start = boundary(seam + len(turn.empty), offsets)[0]
        elif self.has_blocks and turn.options is not None and self.is_complete:
            turns = self.chat.messages[: turn.position + 1]
            blocks = self.chat.tokens(turns, **turn.options)["assistant_masks"]
            mask = blocks if len(blocks) == len(ids) else mask
        labels = [
            token if index >= start and is_trained else IGNORED
            for index, (token, is_trained) in enumerate(zip(ids, mask, strict=True))
        ]
        return {"input_ids": ids, "labels": labels}


def boundary(place: int, offsets: Sequence[tuple[int, int]]) -> tuple[int, bool]:
    """Count the tokens that end before a place in a text, and tell whether none spans it.

    Args:
        offsets: (length, 2), where each token begins and ends in the text.
    """
    number = bisect_right(offsets, place, key=lambda token: token[1])
    return number, all(start >= place for start, _ in offsets[number : number + 1])
