"""Training rows of a conversation that was not generated here: prompts and answers as token ids.

In: a row of turns, the target's tokenizer. Out: one training row where one rendering of the whole
conversation holds each prompt, as the target would be asked, and each answer. Else a row an answer:

    prompt   <user> hello <assistant> <think>        rendered with add_generation_prompt=True
    answer   a greeting </think> good morning <end>  the turn, as the template or the row writes it
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ...measure.chat import OPTIONS, read_options, render
from .forms import as_parts, rendered_form, text_of
from .layouts import Row
from .messages import Message, read_tools, to_messages

Encoded = dict[str, list[int]]  # `input_ids` and `labels`, each (length,)

IGNORED = -100  # the label that cross entropy and the trainer's count of items skip
# with it a template itself marks what the target writes
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
OPENED_THOUGHT = re.compile(r"<(\w*think\w*|reasoning|thought)>\s*$")
ANSWER = "_coral_answer"  # stands for an answer, to see what a template writes after it


class Turn(NamedTuple):
    """A turn that the target writes."""

    position: int  # among the messages
    prompt: str
    answer: str
    follows: bool  # whether the template renders the turn as its prompt, and then the answer
    is_trained: bool


class Chat:
    """A conversation that is rendered and tokenized.

    Args:
        row: with turns.
        tokenizer: the target's.

    Raises:
        ValueError: for a row that cannot be read, or that the chat template cannot render.
    """

    def __init__(self, row: Row, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.is_fast:
            raise ValueError("Conversations need a fast tokenizer; load one, or give `text` rows.")
        own = read_options(row[OPTIONS]) if row.get(OPTIONS) else {}
        tools = read_tools(row)
        self.tokenizer = tokenizer
        self.is_complete = row.get("is_complete") is not False
        self._render: Callable[..., Any] = partial(render, tokenizer=tokenizer, tools=tools, **own)
        weighted = rendered_form(to_messages(row), self._render)
        self.is_weighted = any("weight" in turn for turn in weighted)
        self.messages = [{k: turn[k] for k in turn if k != "weight"} for turn in weighted]
        self.has_blocks = bool(GENERATION_BLOCK.search(tokenizer.get_chat_template(tools=tools)))
        # no prompt can be rendered for a turn that opens the conversation
        places = [i for i, turn in enumerate(weighted) if i and turn["role"] == "assistant"]
        self.turns = [self._read_turn(i, weighted[i].get("weight") != 0) for i in places]

    def encode(self) -> list[Encoded]:
        """Return the training rows, one where that is exact."""
        whole = self._encode_whole()
        if whole is not None:
            found = [whole]
        else:
            found = [self._encode_turn(turn) for turn in self.turns if turn.is_trained]
            found = found or [{"input_ids": [], "labels": []}]
        trained = [label != IGNORED for one in found for label in one["labels"]]
        if (trained and all(trained)) or not (any(trained) or self.is_weighted):
            roles = [turn["role"] for turn in self.messages]
            raise ValueError(
                f"{'Every' if any(trained) else 'No'} token of {roles} is trained; expected the"
                " answers' alone. Drop rows without prompt or answer with `dataset.filter`, or"
                " enclose only the answers in the template in `{% generation %}`."
            )
        return found

    def _text(self, messages: list[Message], **options: Any) -> str:
        return self._render(messages, tokenize=False, **options)

    def _ids(self, text: str) -> list[int]:
        """Tokenize a text, (length,), as `apply_chat_template` does."""
        # not verbose: a warning of the length would come before the cut to `max_length`
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _read_turn(self, position: int, is_trained: bool) -> Turn:
        """Read the prompt of a turn and what the target writes after it."""
        before, turn = self.messages[:position], self.messages[position]
        prompt = self._text(before, add_generation_prompt=True)
        text = self._text([*before, turn])
        thought = (turn.get("reasoning_content") or "").strip()
        if thought and thought not in text:
            raise ValueError(
                f"The chat template leaves out the thought of turn {position}"
                " (`reasoning_content`); write it into `content`, with the marks of the target."
            )
        is_cut = not self.is_complete and position == len(self.messages) - 1
        follows = text.startswith(prompt)
        if follows:
            end = len(self._text([*before, turn], continue_final_message=True)) if is_cut else None
            return Turn(position, prompt, text[len(prompt) : end], follows, is_trained)
        self._check_thought_is_closed(position, prompt, is_cut)
        ending = "" if is_cut else self._ending(before, position)
        return Turn(position, prompt, text_of(turn["content"]) + ending, follows, is_trained)

    def _check_thought_is_closed(self, position: int, prompt: str, is_cut: bool) -> None:
        turn = self.messages[position]
        if turn.get("tool_calls") or turn.get("reasoning_content"):
            raise ValueError(
                f"The chat template does not render turn {position}, with its calls or its thought,"
                " after the prompt of it; let the target answer itself (`coral-hf regenerate`)."
            )
        opened = OPENED_THOUGHT.search(prompt)
        if opened and f"</{opened[1]}>" not in text_of(turn["content"]) and not is_cut:
            raise ValueError(
                f"The prompt of turn {position} opens a thought, `{opened[0].strip()}`, that its"
                " answer does not close. Ask for none with `chat_template_kwargs`, where the"
                " template knows an option for it, or let the target answer itself"
                " (`coral-hf regenerate`)."
            )

    def _ending(self, before: list[Message], position: int) -> str:
        """Return what the template writes after an answer."""
        content = ANSWER if isinstance(before[-1]["content"], str) else as_parts(ANSWER)
        text = self._text([*before, {"role": "assistant", "content": content}])
        if ANSWER not in text:
            raise ValueError(
                f"The chat template does not render the answer of turn {position}; set"
                " `tokenizer.chat_template` to one that does."
            )
        return text.rpartition(ANSWER)[2]

    def _encode_whole(self) -> Encoded | None:
        """Encode the whole conversation as one row; None where a part of it would be another.

        Parts are prompts and answers, as texts and as tokens.
        """
        text = self._text(self.messages)
        if not all(t.follows and text.startswith(t.prompt + t.answer) for t in self.turns):
            return None
        options = {"return_offsets_mapping": True, "verbose": False}
        full = self.tokenizer(text, add_special_tokens=False, **options)
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
            blocks = self._block_mask(self.messages)
            left_out = [t for t in self.turns if not t.is_trained]
            if len(blocks) != len(mask):
                return None
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
        special = self.tokenizer.added_tokens_decoder
        last = next((i for i in reversed(range(number)) if ids[i] in special), 0)
        tail = text[offsets[last][0] : seam] if number else text[:seam]
        return number if self._ids(tail) == ids[last:number] else None

    def _block_mask(self, messages: list[Message]) -> list[int]:
        """Return the mask, (length,), of what the template's generation blocks enclose."""
        options = {"return_assistant_tokens_mask": True, "tokenizer_kwargs": {"verbose": False}}
        return self._render(messages, return_dict=True, **options)["assistant_masks"]

    def _encode_turn(self, turn: Turn) -> Encoded:
        """Encode the prompt and the answer of one turn."""
        prompt, ids = self._ids(turn.prompt), self._ids(turn.prompt + turn.answer)
        size = len(prompt)
        mask = [1] * len(ids)
        if ids[:size] != prompt:  # a token spans both: the target writes others
            apart = [*prompt, *self._ids(turn.answer)]
            if self.tokenizer.decode(apart) != self.tokenizer.decode(ids):
                raise ValueError(
                    f"The tokens of turn {turn.position} are others after its prompt than in the"
                    " whole text; let the target answer itself (`coral-hf regenerate`)."
                )
            ids, mask = apart, [1] * len(apart)
        elif self.has_blocks and turn.follows and self.is_complete:
            blocks = self._block_mask(self.messages[: turn.position + 1])
            mask = blocks if len(blocks) == len(ids) else mask
        labels = [
            token if index >= size and is_trained else IGNORED
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
