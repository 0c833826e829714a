"""Tools of a conversation: what the target may call, and that its calls reach the text.

In: a row, its messages, the chat template as a function. Out: a list of tools, or an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .messages import Message, Row, shown, without_nulls

MARK = "_coral_probe"


def read_tools(row: Row) -> list[Any] | None:
    """The `tools` of a row, JSON or a list of JSON schemas, None where it has none."""
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"`tools` is {shown(tools)}, which is no JSON: {error}.") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"`tools` is {shown(tools)}; expected a list of JSON schemas.")
    return without_nulls(tools) or None


def check_tools_are_rendered(messages: list[Message], render: Callable[..., Any]) -> None:
    """Refuse a template that leaves out tool calls or what came back from them.

    A template that does not know them writes an empty turn, or none, without a word. It is asked
    twice: once as it is, once with other names or results, which must show.
    """
    for has_some, changed, what in (
        (_has_calls, _with_other_calls, "`tool_calls`"),
        (_is_result, _with_other_result, "what turns of the role `tool` hold"),
    ):
        if not any(map(has_some, messages)):
            continue
        other = [changed(turn) if has_some(turn) else turn for turn in messages]
        if render(messages, tokenize=False) == render(other, tokenize=False):
            raise ValueError(
                f"The chat template leaves out {what}; set `tokenizer.chat_template` to one that"
                " renders them, or drop such rows with `dataset.filter`."
            )


def _has_calls(turn: Message) -> bool:
    return bool(turn.get("tool_calls"))


def _is_result(turn: Message) -> bool:
    return turn["role"] == "tool" and bool(turn.get("content"))


def _with_other_calls(turn: Message) -> Message:
    return {**turn, "tool_calls": [_renamed(call) for call in turn["tool_calls"]]}


def _renamed(call: Any) -> Any:
    """A call of another function; OpenAI's layout keeps its name under `function`."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return {**call, "function": _renamed(call["function"])}
    if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
        raise ValueError(
            f"A tool call is {shown(call)}; expected a `function` with `name` and `arguments`."
        )
    return {**call, "name": call["name"] + MARK}


def _with_other_result(turn: Message) -> Message:
    return {**turn, "content": turn["content"] + MARK}
