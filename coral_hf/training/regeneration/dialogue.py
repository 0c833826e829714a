"""A row of a dataset whose answers are generated one after the other.

In: a row of any layout. Out: the prompt of the next answer, and in the end the row with its new
answers.

    user  assistant  user  assistant (calls a tool)  tool     assistant  user
          generated        stays, as its result does stays    generated  + a generated answer

A plain text is a dialogue of one question, its first tokens, and one answer, which continues it.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.messages import Message, Row, layout_of, to_messages
from ..data.template import read_tools, render
from .answers import Answer, RegenerationSettings


class Dialogue:
    """The messages of a row so far, and those to come.

    Args:
        number: of the row in its dataset.
        row: of any layout but `input_ids`.
        settings: how many tokens of a plain text are kept.

    Raises:
        ValueError: for a row that cannot be read, or that holds tokens.
    """

    def __init__(self, number: int, row: Row, settings: RegenerationSettings):
        layout = layout_of(row)
        if layout == "input_ids":
            raise ValueError("A row of `input_ids` has no turns; give `messages` or `text`.")
        self.number, self.id = number, row.get("id")
        self.prompt_tokens = settings.prompt_tokens if layout == "text" else None
        self.messages: list[Message] = []
        self.rest, self.tools = [{"role": "user", "content": row.get("text")}], None
        if layout != "text":
            self.rest, self.tools = to_messages(row), read_tools(row)
        self.num_turns = len(self.rest)
        self.content = json.dumps([self.rest, self.tools, layout == "text"])
        self.start: list[int] = []  # (kept,) tokens of a plain text before its answer
        self.num_answers = 0
        self.num_kept = 0  # messages up to the last answer
        self.is_complete = True
        self.stopped: str | None = None  # why it ends before its last turn

    def advance(self) -> bool:
        """Move on to the next turn that the target writes; False if there is none."""
        while self.rest and self.stopped is None:
            turn = self.rest.pop(0)
            # a call stays, since its result would not fit another
            has_result = bool(self.rest) and self.rest[0]["role"] == "tool"
            is_call = bool(turn.get("tool_calls")) or has_result
            if self.messages and turn["role"] == "assistant" and not is_call:
                return True
            self.messages.append(turn)
        # a conversation that ends with a question gets its answer
        return self.stopped is None and self.messages[-1]["role"] in ("user", "tool")

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens before the next answer, (length,)."""
        silent = {"add_special_tokens": False, "verbose": False}
        if self.prompt_tokens is None:
            options = {"add_generation_prompt": True, "tokenize": False}
            text = render(self.messages, tokenizer, self.tools, **options)
            return tokenizer(text, **silent)["input_ids"]
        ids = tokenizer(self.messages[0]["content"], **silent)["input_ids"]
        opening = [bos] if (bos := tokenizer.bos_token_id) is not None else []
        self.start = ids[len(opening) if ids[:1] == opening else 0 :][: self.prompt_tokens]
        return [*opening, *self.start]

    def take(self, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> None:
        """Add an answer; nothing follows one that was cut off."""
        text = tokenizer.decode([*self.start, *answer.tokens], clean_up_tokenization_spaces=False)
        if not answer.is_complete:
            self.stopped = "an answer that was cut off"
            text = text.rstrip("\ufffd")  # the cut may go through a character of several tokens
            if not text.strip():
                self.stopped += " before its first word"
                return
        self.messages.append({"role": "assistant", "content": text})
        self.num_answers += 1
        self.num_kept = len(self.messages)
        self.is_complete = answer.is_complete

    def result(self) -> dict[str, Any]:
        """The row to be written, with its number; without an answer, the `reason`."""
        row = {"row": self.number}
        if not self.num_answers:
            return {**row, "reason": self.stopped or "no turn to answer"}
        if self.id is not None:
            row["id"] = self.id
        if self.prompt_tokens is not None:
            return {**row, "text": self.messages[-1]["content"], "is_complete": self.is_complete}
        kept = self.messages if self.stopped is None else self.messages[: self.num_kept]
        tools = {"tools": json.dumps(self.tools, ensure_ascii=False)} if self.tools else {}
        return {**row, "messages": kept, **tools, "is_complete": self.is_complete}
