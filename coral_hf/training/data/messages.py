"""Chat messages, with `role` and `content`, from conversations of any layout.

In: a row of a dataset. Out: a list of messages, as chat templates read them, or a ValueError that
says what cannot be read.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from reprlib import repr as shortened
from typing import Any

from .layouts import Row, check_unread, is_plain_text, read_text, read_turns

Message = dict[str, Any]

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a turn

WEIGHTS = ("weight", "train", "loss")  # keys of a turn that say whether it is trained

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    # a function call is written by the target, what comes back is not
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
}


def to_messages(row: Row) -> list[Message]:
    """Convert a conversation of any accepted layout to messages with `role` and `content`.

    A `system` or `system_prompt` column goes in front; the answer of a preference row is its
    `chosen` one. A turn of `weight` 0 is not trained.

    Raises:
        ValueError: for what cannot be read, and for a column with text or a mask that is not read.
    """
    turns, columns = read_turns(row)
    messages = [_message(turn, position) for position, turn in enumerate(turns)]
    check_unread(row, columns, [turn.get("content", "") for turn in messages])
    return messages


def _message(turn: Any, position: int) -> Message:
    """Rename ShareGPT's keys and roles; keep what else templates read (`tool_calls`, `name`)."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"Turn {position} is {shortened(turn)}; expected `role` and `content`.")
    names: Row = {"from": "role", "value": "content"}
    message: Message = {names.get(k, k): part for k, part in turn.items() if part is not None}
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"Turn {position} has role {role!r}; known are {[*ROLES]}. Rename it.")
    thought = next((message[name] for name in THOUGHTS if message.get(name)), None)
    if thought is not None:  # templates know it by either of these names
        message |= dict.fromkeys(THOUGHTS[:2], thought)
    _read_weight(message, position)
    if message.get("tool_calls"):
        message["tool_calls"] = without_nulls(message["tool_calls"])
    elif "content" not in message:
        raise ValueError(f"Turn {position} ({role}) has no content; fill it, or drop the turn.")
    if "content" in message:
        message["content"] = _text(message["content"], f"turn {position} ({role})")
    return {**message, "role": ROLES[role]}


def _read_weight(message: Message, position: int) -> None:
    """Read which turns are trained: a `weight` of 0 or 1 (OpenAI), `train` or `loss` as bools."""
    for name in WEIGHTS:
        if name not in message:
            continue
        value = message.pop(name)
        if value not in (0, 1):
            raise ValueError(f"Turn {position} has `{name}` {value!r}; use 0 or 1, or leave it.")
        if value == 0:
            message["weight"] = 0
    unread = [name for name in message if name in ("mask", "masked", "loss_mask", "loss_weight")]
    if unread:
        raise ValueError(
            f"Turn {position} has `{unread[0]}`, which is not read; use `weight`, 0 for a turn that"
            " is not trained, or leave it out."
        )


def _text(content: Any, where: str) -> str:
    """Join the parts of a content, since templates for text would print a list."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [None]:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise ValueError(
                    f"The content of {where} is {shortened(content)}; expected text, or a list of"
                    " `{'type': 'text', 'text': ...}`. Drop such rows with `dataset.filter`."
                )
    return "".join(texts)


def without_nulls(value: Any) -> Any:
    """Leave out keys without a value, at any depth.

    Rows of a table share their keys: of a call with the argument `city` and one with `date`, each
    comes back with both, one of them null.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def count_empty_turns(row: Row, messages: list[Message]) -> int:
    """Count the turns of a row without a word and without a tool call; an empty text is one."""
    if is_plain_text(row):
        return int(not read_text(row)[1].strip())
    return sum(not (turn.get("tool_calls") or turn["content"].strip()) for turn in messages)


def read_tools(row: Row) -> list[Any] | None:
    """Read the `tools` of a row, a list of JSON schemas or its JSON; None where it has none.

    Rendering them refuses anything else.
    """
    tools = row.get("tools") or None
    if isinstance(tools, str):
        with suppress(json.JSONDecodeError):
            tools = json.loads(tools)
    return without_nulls(tools) or None
