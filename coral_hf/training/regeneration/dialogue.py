"""A row of a dataset whose answers are generated one after the other.

In: a row of any layout. Out: the prompt of the next answer, and in the end the row with its new
answers, as messages and as the tokens that the target read and wrote.

    user  assistant  user  assistant (calls a tool)  tool     assistant  user
          generated        stays, as its result does stays    generated  + a generated answer

A plain text is a dialogue of one question, its first tokens, and one answer, which continues it.

Where the prompt of an answer begins with all tokens before it, they share a row of tokens:

    input_ids   prompt  answer  rest of the next prompt  answer
    loss_mask   0 .. 0  1 .. 1  0 .................... 0  1 .. 1
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from ...identity import short_hash, tokenizer_hash
from ...measure.calls import until_stop
from ...measure.chat import OPTIONS, chat_options, read_options, render
from ..data.encoding import text_ids
from ..data.forms import rendered_form
from ..data.messages import Message, Row, is_plain_text, read_text, read_tools, to_messages
from . import RegenerationSettings


def end_tokens(config: GenerationConfig, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end an answer: the target's, or where it names none, its tokenizer's.

    `config`: the target's generation config.
    """
    ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def longest_prompt(positions: float, settings: RegenerationSettings) -> float:
    """Return how many tokens of `positions` an answer leaves to its prompt.

    Raises:
        ValueError: if it leaves none.
    """
    if (most := settings.max_new_tokens) >= positions:
        raise ValueError(f"`max_new_tokens` is {most}, but there are {positions} positions.")
    return positions - most


def asked_for(settings: RegenerationSettings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Collect what answers of any target depend on, as plain values by name."""
    return {
        **{name: value for name, value in asdict(settings).items() if name != "batch_size"},
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": tokenizer.chat_template,
        "chat_template_kwargs": chat_options(tokenizer),
    }


class Dialogue:
    """The messages of a row so far, and those to come.

    Args:
        number: of the row in its dataset.
        row: of any layout but `input_ids`.
        tokenizer: the target's.
        settings: how the target answers.

    Raises:
        ValueError: for a row that cannot be read, or that holds tokens.
    """

    def __init__(self, number: int, row: Row, tokenizer: Tokenizer, settings: RegenerationSettings):
        self.number, self._id, self._is_text = number, row.get("id"), is_plain_text(row)
        self._tokenizer, self._settings = tokenizer, settings
        self._messages: list[Message] = []
        prompt, text = read_text(row) if self._is_text else ("", "")
        self._has_prompt = bool(prompt)  # of its own, which is read as a whole
        first = {"role": "user", "content": prompt or text}
        self._rest = [first] if self._is_text else to_messages(row)
        tools = None if self._is_text else read_tools(row)
        options = read_options(row[OPTIONS]) if row.get(OPTIONS) else {}
        self._given = {"tokenizer": tokenizer, "tools": tools, **options}  # of `render`
        self.num_turns = len(self._rest)
        self.content = json.dumps([self._rest, tools, self._is_text, options])
        self._start: list[int] = []  # (kept,) tokens of a plain text before its answer
        self._prompt: list[int] = []  # (length,) of the answer that comes next
        self._token_rows: list[dict[str, Any]] = []  # what the target read and wrote
        self.num_kept = 0  # messages up to the last answer
        self._is_complete = True
        self.stopped: str | None = None  # why it ends before its last turn

    def next_prompt(self, max_length: float) -> list[int]:
        """Move on to the next turn that the target writes.

        Returns:
            (length,), the tokens before it; empty where the dialogue ends.
        """
        if not self._advance():
            return []
        try:
            ids = self._text_prompt() if self._is_text else self._chat_prompt()
            if len(ids) > max_length:
                room = f"at most {max_length} leave room for an answer"
                raise ValueError(f"a prompt of {len(ids)} tokens; {room}")
        except ValueError as error:
            self.stopped, ids = str(error), []
        self._prompt = ids
        return ids

    def take(self, tokens: list[int], ends: Sequence[int]) -> None:
        """Add an answer, (new,), up to an end token; nothing follows one that was cut off."""
        tokens = until_stop(tokens, ends)
        is_complete = not {*tokens}.isdisjoint(ends)
        ids = [*self._start, *(tokens[:-1] if is_complete else tokens)]
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if not is_complete:
            self.stopped = "an answer that was cut off"
            text = text.rstrip("\ufffd")  # the cut may go through a character of several tokens
            if self._settings.unfinished == "drop" or not text.strip():
                return
        self._messages.append({"role": "assistant", "content": text})
        self.num_kept, self._is_complete = len(self._messages), is_complete
        # what was read and written goes into the last row of tokens, or begins another
        rows, prompt = self._token_rows, self._prompt
        if not rows or prompt[: len(rows[-1]["input_ids"])] != rows[-1]["input_ids"]:
            tokenizer = short_hash(self._tokenizer)
            rows.append({"input_ids": [], "loss_mask": [], "tokenizer": tokenizer})
        read = prompt[len(rows[-1]["input_ids"]) :]
        rows[-1]["input_ids"] += [*read, *tokens]
        rows[-1]["loss_mask"] += [0] * len(read) + [1] * len(tokens)

    def result(self) -> dict[str, Any]:
        """Make the row to be written, with its number; without an answer, the `reason`."""
        row = {"row": self.number}
        if not self.num_kept:
            return {**row, "reason": self.stopped or "no turn to answer"}
        if self._id is not None:
            row["id"] = self._id
        ending = {"is_complete": self._is_complete, "token_rows": self._token_rows}
        if self._is_text:
            return {**row, "text": self._messages[-1]["content"], **ending}
        kept = self._messages if self.stopped is None else self._messages[: self.num_kept]
        tools = self._given["tools"]
        tools = {"tools": json.dumps(tools, ensure_ascii=False)} if tools else {}
        return {**row, "messages": kept, **tools, **ending}

    def _advance(self) -> bool:
        """Keep turns up to the next one that the target writes; False if there is none."""
        while self._rest and self.stopped is None:
            turn = self._rest.pop(0)
            # a call stays, since its result would not fit another
            has_result = bool(self._rest) and self._rest[0]["role"] == "tool"
            is_call = bool(turn.get("tool_calls")) or has_result
            if self._messages and turn["role"] == "assistant" and not is_call:
                return True
            self._messages.append(turn)
        # a conversation that ends with a question gets its answer
        return self.stopped is None and self._messages[-1]["role"] in ("user", "tool")

    def _chat_prompt(self) -> list[int]:
        rendered: Callable[..., str] = partial(render, tokenize=False, **self._given)
        text = rendered(rendered_form(self._messages, rendered), add_generation_prompt=True)
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _text_prompt(self) -> list[int]:
        """Take a prompt or the first tokens of a text, (length,), after BOS where there is one."""
        ids = text_ids(self._messages[0]["content"], self._tokenizer)
        opening = 0 if self._tokenizer.bos_token_id is None else 1
        most = None if self._has_prompt else opening + self._settings.prompt_tokens
        self._start = ids[opening:most]
        return ids[:most]
