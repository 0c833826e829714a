"""A row whose answers the target writes anew, one after the other.

In: a row of any layout. Out: the prompt of the next answer, and in the end the row in the target's
own words.

    user  assistant  user  assistant (calls a tool)  tool    assistant  user
          anew             stays, as its result does stays   anew       + a new answer at the end
"""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.messages import Message, Row, layout_of, to_messages
from ..data.template import read_tools, render
from .answers import Answer


class Dialogue:
    """A conversation: what was said so far, and what is to come."""

    def __init__(self, row: Row):
        self.messages: list[Message] = []
        self.rest = to_messages(row)
        self.tools = read_tools(row)
        self.num_answers = 0
        self.num_kept = 0  # messages up to the last answer
        self.is_complete = True
        self.stopped: str | None = None  # why it ends before its last turn

    def advance(self) -> bool:
        """Take turns over up to the next one that the target writes; False if there is none."""
        while self.rest and self.stopped is None:
            turn = self.rest.pop(0)
            if self.messages and _is_answer(turn, self.rest):
                return True
            self.messages.append(turn)
        # a conversation that ends with a question gets its answer
        return self.stopped is None and self.messages[-1]["role"] in ("user", "tool")

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens before the next answer, (length,)."""
        text = render(
            self.messages, tokenizer, self.tools, add_generation_prompt=True, tokenize=False
        )
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def take(self, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> None:
        """Add an answer; nothing follows one that was cut off."""
        text = read_text(answer, tokenizer)
        if not (answer.is_complete or text.strip()):
            self.stop("an answer that was cut off before its first word")
            return
        self.messages.append({"role": "assistant", "content": text})
        self.num_answers += 1
        self.num_kept = len(self.messages)
        if not answer.is_complete:
            self.stop("an answer that was cut off")
            self.is_complete = False

    def stop(self, reason: str) -> None:
        """End it after its last answer."""
        self.stopped = reason

    def result(self) -> dict[str, Any]:
        """The row that is written."""
        kept = self.messages if self.stopped is None else self.messages[: self.num_kept]
        tools = {"tools": json.dumps(self.tools, ensure_ascii=False)} if self.tools else {}
        return {"messages": kept, **tools, "is_complete": self.is_complete}


class Passage:
    """A text, of which the target continues the start."""

    def __init__(self, row: Row, prompt_tokens: int):
        self.text, self.prompt_tokens = row["text"], prompt_tokens
        self.num_answers = 0
        self.is_complete = True
        self.stopped: str | None = None

    def advance(self) -> bool:
        """Whether the target is still to write."""
        return self.stopped is None and self.num_answers == 0

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The first tokens of the text, after BOS where there is one, (length,)."""
        ids = tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"]
        bos = tokenizer.bos_token_id
        start = [] if bos is None or ids[:1] == [bos] else [bos]
        return [*start, *ids[: self.prompt_tokens]]

    def take(self, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> None:
        """Put the answer behind the start."""
        prompt = self.prompt(tokenizer)
        start = int(prompt[:1] == [tokenizer.bos_token_id])
        self.text = read_text(answer._replace(tokens=prompt[start:] + answer.tokens), tokenizer)
        self.num_answers = 1
        self.is_complete = answer.is_complete

    def stop(self, reason: str) -> None:
        """End it without an answer."""
        self.stopped = reason

    def result(self) -> dict[str, Any]:
        """The row that is written."""
        return {"text": self.text, "is_complete": self.is_complete}


def open_row(row: Row, prompt_tokens: int) -> Dialogue | Passage:
    """A row as what the target answers.

    Raises:
        ValueError: for a row that cannot be read, or that holds tokens.
    """
    layout = layout_of(row)
    if layout == "input_ids":
        raise ValueError("A row of `input_ids` has no turns; give `messages` or `text`.")
    return Passage(row, prompt_tokens) if layout == "text" else Dialogue(row)


def _is_answer(turn: Message, rest: list[Message]) -> bool:
    """Whether the target writes a turn; a call stays, since its result would not fit another."""
    has_result = bool(rest) and rest[0]["role"] == "tool"
    return turn["role"] == "assistant" and not turn.get("tool_calls") and not has_result


def read_text(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> str:
    """The words of an answer, special tokens as they stand."""
    text = tokenizer.decode(answer.tokens, clean_up_tokenization_spaces=False)
    # a cut may go through a character of several tokens
    return text if answer.is_complete else text.rstrip("\ufffd")
