"""Conversations of any layout as messages with `role` and `content`.

In: a row of a dataset. Out: a list of messages, as chat templates read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, Any]

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    # a function call is written by the target, what comes back is not
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
}


def to_messages(row: Row) -> list[Message]:
    """Write a conversation of any accepted layout as messages with `role` and `content`.

    A `system` column goes in front; the answer of a preference row is its `chosen` turn.
    """
    layout = layout_of(row)
    if layout in ("text", "input_ids"):
        raise ValueError(f"A row of `{layout}` is no conversation; pass it to `tokenize` as it is.")
    turns = _alpaca_turns(row) if layout == "instruction" else list(row[layout])
    if not turns:
        raise ValueError(f"`{layout}` has no turns; drop such rows with `dataset.filter`.")
    if isinstance(row.get("chosen"), Mapping):
        turns.append(row["chosen"])
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": row["system"]})
    return [_message(turn, position) for position, turn in enumerate(turns)]


def layout_of(row: Row) -> str:
    """Name the column that decides how a row is read; what is nearest to the trainer goes first."""
    columns = [column for column, value in row.items() if value is not None]
    has_answer = "output" in columns or "response" in columns
    for column in ("input_ids", "messages", "conversations", "instruction", "text"):
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


def _message(turn: Row, position: int) -> Message:
    """Rename ShareGPT's keys and roles; keep what else templates read (`tool_calls`, `name`)."""
    keys = {"from": "role", "value": "content"}
    message = {keys.get(key, key): value for key, value in turn.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"Turn {position} has role {role!r}; known are {[*ROLES]}. Rename it.")
    if "content" not in message and "tool_calls" not in message:
        raise ValueError(f"Turn {position} ({role}) has no content; fill it, or drop the turn.")
    return {**message, "role": ROLES[role]}
