"""Turns that a target writes: what it is asked, and what it writes after that.

In: a row of turns, the target's tokenizer. Out: its messages in a form that the template renders,
and of each answer the prompt, rendered with add_generation_prompt=True, and the text after it.

A prompt may open a thought, or close an empty one. A turn without a thought, or with one, is asked
for with the template's switch; where there is none, an opened thought that stays empty is read:

    prompt   <user> hello <assistant> <think>                       with a thought
    prompt   <user> hello <assistant> <think> </think>              with an empty one
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from ...measure.chat import OPTIONS, chat_options, read_options, render
from .forms import as_parts, rendered_form, text_of
from .messages import Message, Row, read_tools, to_messages

logger = logging.get_logger(__name__)

SWITCHES = ("enable_thinking", "thinking")  # options that ask for a thought, or for none
OPENED_THOUGHT = re.compile(r"(<(\w*think\w*|reasoning|thought)>)(\s*)$")
CLOSED_THOUGHT = re.compile(r"</(\w*think\w*|reasoning|thought)>")
EMPTY_THOUGHTS = (
    "Prompts open a thought that some answers do not have: they are trained after an empty one."
    " Better let the target answer itself (`coral-hf regenerate`)."
)
ANSWER = "_coral_answer"  # stands for an answer, to see what a template writes after it


class Turn(NamedTuple):
    """A turn that the target writes."""

    position: int  # among the messages
    prompt: str
    empty: str  # a thought without a word, which is read after the prompt and not trained
    answer: str
    # with which the template renders the turn as its prompt, and then the answer; None if it cannot
    options: dict[str, bool] | None
    is_trained: bool


class RenderedChat:
    """A conversation, and its renderings.

    Args:
        row: with turns.
        tokenizer: the target's.

    Raises:
        ValueError: for a row that cannot be read, or that the chat template cannot render.
    """

    def __init__(self, row: Row, tokenizer: Tokenizer):
        own = read_options(row[OPTIONS]) if row.get(OPTIONS) else {}
        tools = read_tools(row)
        self.template = tokenizer.get_chat_template(tools=tools)
        self.is_complete = row.get("is_complete") is not False
        self._options = {**chat_options(tokenizer), **own}
        self._render: Callable[..., Any] = partial(render, tokenizer=tokenizer, tools=tools, **own)
        # a rendering, and the messages whose ids are its key
        self._known: dict[tuple[Any, ...], tuple[Any, Sequence[Message]]] = {}
        weighted = rendered_form(to_messages(row), self.text)
        self.is_weighted = any("weight" in turn for turn in weighted)
        self.messages = [{k: turn[k] for k in turn if k != "weight"} for turn in weighted]
        # no prompt can be rendered for a turn that opens the conversation
        places = [i for i, turn in enumerate(weighted) if i and turn["role"] == "assistant"]
        self.turns = [self._read_turn(i, weighted[i].get("weight") != 0) for i in places]

    def text(self, messages: Sequence[Message], **options: Any) -> str:
        """Render messages as text, once."""
        key = (*map(id, messages), *options.items())
        if key not in self._known:
            self._known[key] = self._render(messages, tokenize=False, **options), messages
        return self._known[key][0]

    def tokens(self, messages: Sequence[Message], **options: Any) -> dict[str, Any]:
        """Render messages as tokens: `input_ids`, `offset_mapping` and the `assistant_masks` of
        the template's generation blocks, each (length,)."""
        given = {"return_offsets_mapping": True, "verbose": False}
        options |= {"return_dict": True, "return_assistant_tokens_mask": True}
        return self._render(messages, tokenizer_kwargs=given, **options)

    def _read_turn(self, position: int, is_trained: bool) -> Turn:
        """Read the prompt of a turn, and what the target writes after it."""
        before, turn = self.messages[:position], self.messages[position]
        is_cut = not self.is_complete and position == len(self.messages) - 1
        for options in self._switches(turn, is_cut):
            prompt = self.text(before, add_generation_prompt=True, **options)
            text = self.text([*before, turn], **options)
            if text.startswith(prompt) and thought_of(turn) in text:
                opened = {**options, "continue_final_message": True}
                end = len(self.text([*before, turn], **opened)) if is_cut else None
                return Turn(position, prompt, "", text[len(prompt) : end], options, is_trained)
        return Turn(position, *self._read_apart(position, is_cut), None, is_trained)

    def _switches(self, turn: Message, is_cut: bool) -> Iterator[dict[str, bool]]:
        """Yield options of the template: none, and what asks for a thought if the turn has one.

        One that was set counts; of an answer that was cut off, nothing tells what it is a part of.
        """
        yield {}
        has_thought = bool(thought_of(turn) or CLOSED_THOUGHT.search(text_of(turn)))
        for name in SWITCHES:
            if name in self.template and name not in self._options and not is_cut:
                yield {name: has_thought}

    def _read_apart(self, position: int, is_cut: bool) -> tuple[str, str, str]:
        """Read prompt, empty thought and answer of a turn that is not rendered after its prompt.

        Targets write a line break around each mark of a thought, two behind (DeepSeek-R1, Qwen3).
        """
        before, turn, empty = self.messages[:position], self.messages[position], ""
        prompt, text = self.text(before, add_generation_prompt=True), self.text([*before, turn])
        opened, thought = OPENED_THOUGHT.search(prompt), thought_of(turn)
        if opened and turn.get("tool_calls") and not is_cut:  # which the template writes
            start = prompt[: opened.start()]
            written = text.removeprefix(start)
            is_rendered = text.startswith(start) and not written.startswith(opened[1])
        else:
            is_rendered = not turn.get("tool_calls") and bool(opened or not thought)
            written = text_of(turn) + self._ending(position, is_cut) if is_rendered else ""
        if not is_rendered:
            what = f"turn {position}, with its calls or its thought, after the prompt of it"
            remedy = "write a thought into `content`, or let the target answer itself"
            raise ValueError(f"The chat template does not render {what}; {remedy}.")
        if opened:
            mark, lines, closing = opened[1], opened[3], f"</{opened[2]}>\n\n"
            if thought:
                written = f"{thought}\n{closing}{written}" if written else thought
            elif is_cut or closing.rstrip() in written:  # the prompt has written the mark
                written = re.sub(rf"\A\s*{re.escape(mark)}(?:{lines})?", "", written)
            else:
                logger.warning_once(EMPTY_THOUGHTS)
                empty = ("\n" if lines.endswith("\n") else "\n\n") + closing
        return prompt, empty, written

    def _ending(self, position: int, is_cut: bool) -> str:
        """Return what the template writes after an answer; nothing after one that was cut off."""
        if is_cut:
            return ""
        before, turn = self.messages[:position], self.messages[position]
        content = as_parts(ANSWER) if isinstance(turn.get("content"), list) else ANSWER
        text = self.text([*before, {"role": "assistant", "content": content}])
        if ANSWER not in text:
            raise ValueError(f"The chat template does not render the answer of turn {position}.")
        return text.rpartition(ANSWER)[2]


def thought_of(turn: Message) -> str:
    """Return the thought of a turn that stands beside its content."""
    return (turn.get("reasoning_content") or "").strip()
