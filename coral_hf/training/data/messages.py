"""Chat messages, with `role` and `content`, from conversations of any layout.

In: a row of a dataset. Out: a list of messages, as chat templates read them, or a ValueError that
says what cannot be read.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from reprlib import repr as shortened
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, Any]

TOKENS = ("token_rows", "input_ids")  # columns of rows that are tokens

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a turn

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    # a function call is written by the target, what comes back is not
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
}


def to_messages(row: Row) -> list[Message]:
    """Convert a conversation of any accepted layout to messages with `role` and `content`.

    A `system` column goes in front; the answer of a preference row is its `chosen` turn.
    """
    layout = layout_of({**row, "token_rows": None})  # messages stand beside those
    if layout in ("text", "input_ids"):
        raise ValueError(f"A row of `{layout}` is no conversation; pass it to `tokenize` as it is.")
    turns = _alpaca_turns(row) if layout == "instruction" else row[layout]
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError(
            f"`{layout}` is {shortened(turns)}, not a list of turns; read JSON that is kept as text"
            " with `json.loads`."
        )
    if not turns:
        raise ValueError(f"`{layout}` has no turns; drop such rows with `dataset.filter`.")
    turns = list(turns)
    if isinstance(row.get("chosen"), Mapping):
        turns.append(row["chosen"])
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": row["system"]})
    return [_message(turn, position) for position, turn in enumerate(turns)]


def layout_of(row: Row) -> str:
    """Name the column that a row is read by; what is nearest to the trainer's input goes first."""
    columns = [column for column, value in row.items() if value is not None]
    has_answer = "output" in columns or "response" in columns
    for column in ("token_rows", "input_ids", "messages", "conversations", "instruction", "text"):
        if column == "token_rows" and not row.get(column):
            continue
        if column in columns and (column != "instruction" or has_answer):
            return column
    raise ValueError(
        f"Found the columns {columns}; rename yours to `messages` (role, content), `conversations`"
        " (from, value), `instruction` with `output` or `response`, `text`, or `input_ids`."
    )


def _alpaca_turns(row: Row) -> list[Message]:
    question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    answer = row["output"] if row.get("output") is not None else row["response"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


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
    if message.get("tool_calls"):
        message["tool_calls"] = without_nulls(message["tool_calls"])
    elif "content" not in message:
        raise ValueError(f"Turn {position} ({role}) has no content; fill it, or drop the turn.")
    if "content" in message:
        message["content"] = _text(message["content"], f"turn {position} ({role})")
    return {**message, "role": ROLES[role]}


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


def count_empty_turns(row: Row) -> int:
    """Count the turns without a word and without a tool call; an empty text is one."""
    layout = layout_of(row)
    if layout in ("text", *TOKENS):
        return int(layout == "text" and not row["text"].strip())
    return sum(not (turn.get("tool_calls") or turn["content"].strip()) for turn in to_messages(row))


def read_tools(row: Row) -> list[Any] | None:
    """Read the `tools` of a row, a list of JSON schemas or its JSON; None where it has none.

    Rendering them refuses anything else.
    """
    tools = row.get("tools") or None
    if isinstance(tools, str):
        with suppress(json.JSONDecodeError):
            tools = json.loads(tools)
    return without_nulls(tools) or None
