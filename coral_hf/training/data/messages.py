"""Chat messages and plain texts, from the rows of datasets of any layout.

In: a row. Out: its messages, with `role` and `content` as chat templates read them, or its prompt
and text; a ValueError that says what cannot be read, or names a column with text or a mask that its
layout does not read.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from reprlib import repr as shortened
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, Any]

# what is nearest to the trainer's input goes first
LAYOUTS: tuple[str, ...] = ("token_rows", "input_ids", "messages", "conversations")
LAYOUTS += ("completion", "chosen", "instruction", "text")
SYSTEM = ("system", "system_prompt")
ANSWERS = ("output", "response")  # of an instruction
TOKEN_MASKS = ("loss_mask", "completion_mask", "assistant_masks")
READ_ELSEWHERE = {"id", "row", "tools", "is_complete", "chat_template_kwargs", "position_ids"}
# columns that describe a row; others of single words or numbers do so too
DESCRIPTIONS = {
    *("source", "dataset", "origin", "category", "topic", "task", "language", "lang", "license"),
    *("url", "model", "split", "type", "title", "date", "timestamp", "created", "author", "tags"),
    *("score", "rating", "quality", "name", "hash", "file", "path", "meta", "metadata", "info"),
}
MASK = re.compile(r"(^|_)(masks?|labels?|weights?|loss|train|trained)($|_)")
WORDS = re.compile(r"[^\W\d_]\S*\s+\S*[^\W\d_]")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a turn
WEIGHTS = ("weight", "train", "loss")  # keys of a turn that say whether it is trained
TURN_MASKS = ("mask", "masked", "loss_mask", "loss_weight")  # which are not read
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    # a function call is written by the target, what comes back is not
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
}


def layout_of(row: Row) -> str:
    """Name the layout of a row: the column that it is read by."""
    columns = [name for name in row if row[name] is not None]
    needs = {"completion": ("prompt",), "instruction": ANSWERS}
    for layout in LAYOUTS:
        needed = needs.get(layout, (layout,))
        if layout == "chosen" and isinstance(row.get(layout), str):
            needed = ("prompt",)
        is_empty = layout == "token_rows" and not row.get(layout)
        if layout in columns and {*needed} & {*columns} and not is_empty:
            return layout
    raise ValueError(
        f"Found the columns {columns}; rename yours to `messages` (role, content), `conversations`"
        " (from, value), `prompt` with `completion` or `chosen`, `instruction` with `output` or"
        " `response`, `text`, or `input_ids`."
    )


def is_plain_text(row: Row) -> bool:
    """Whether a row is text without turns: `text`, or a prompt and its completion as text."""
    layout = layout_of(row)
    pair = row.get("prompt"), row.get(layout)
    is_pair = layout in ("completion", "chosen") and all(isinstance(part, str) for part in pair)
    return layout == "text" or is_pair


def read_text(row: Row) -> tuple[str, str]:
    """Return the prompt of a row of plain text, which is not trained, and the text after it."""
    layout = layout_of(row)
    prompt, text = "" if layout == "text" else row["prompt"], row[layout]
    if not isinstance(text, str):
        raise ValueError(f"`{layout}` is {shortened(text)}; expected a str.")
    check_unread(row, {layout, "rejected", *(["prompt"] if prompt else [])}, [text])
    return prompt, text


def to_messages(row: Row) -> list[Message]:
    """Convert a conversation of any accepted layout to messages with `role` and `content`.

    A `system` or `system_prompt` column goes in front; the answer of a preference row is its
    `chosen` one. A turn of `weight` 0 is not trained.

    Raises:
        ValueError: for what cannot be read, and for a column with text or a mask that is not read.
    """
    # messages stand beside tokens that were kept of them
    row = {name: row[name] for name in row if name != "token_rows"}
    layout = layout_of(row)
    if layout in ("text", "input_ids") or is_plain_text(row):
        raise ValueError(f"A row of `{layout}` is no conversation; pass it to `tokenize` as it is.")
    if layout == "instruction":
        turns, columns = _instruction(row)
    elif layout in ("completion", "chosen"):
        turns, columns = _completion(row, layout)
    else:
        turns, columns = _listed(row[layout], layout), {layout}
        if isinstance(row.get("chosen"), Mapping):
            turns.append(row["chosen"])
            columns |= {"chosen", "rejected"}
    for name in SYSTEM:
        if row.get(name):
            turns.insert(0, {"role": "system", "content": row[name]})
            columns.add(name)
    messages = [_message(turn, position) for position, turn in enumerate(turns)]
    check_unread(row, columns, [turn.get("content", "") for turn in messages])
    return messages


def _listed(turns: Any, layout: str) -> list[Any]:
    """Return a list of turns."""
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError(f"`{layout}` is {shortened(turns)}, not a list of turns (`json.loads`?).")
    if not turns:
        raise ValueError(f"`{layout}` has no turns; drop such rows with `dataset.filter`.")
    return list(turns)


def _instruction(row: Row) -> tuple[list[Any], set[str]]:
    """Read Alpaca's layout, with `input` or Dolly's `context`, and LLaMA-Factory's `history`."""
    parts = [name for name in ("instruction", "input", "context") if row.get(name)]
    answer = next(name for name in ANSWERS if row.get(name) is not None)
    pairs = [*(row.get("history") or []), ["\n\n".join(row[name] for name in parts), row[answer]]]
    turns = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"`history` has {shortened(pair)}; expected [question, answer].")
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    return turns, {*parts, "history", answer}


def _completion(row: Row, layout: str) -> tuple[list[Any], set[str]]:
    """Read a prompt and its answer, of which the last is trained; a `rejected` answer is not read.

    A `chosen` conversation may hold its own prompt.
    """
    prompt, answer, columns = row.get("prompt"), row[layout], {layout, "rejected"}
    answer = _turn("assistant", answer) if isinstance(answer, str) else answer
    turns = [answer] if isinstance(answer, Mapping) else _listed(answer, layout)
    if prompt is not None and not isinstance(prompt, str):
        turns = [*({**turn, "weight": 0} if _is_answer(turn) else turn for turn in prompt), *turns]
        columns.add("prompt")
    elif prompt is not None and _is_answer(turns[0]):
        turns.insert(0, _turn("user", prompt))
    return turns, columns


def _is_answer(turn: Any) -> bool:
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else ""
    return ROLES.get(role) == "assistant"


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


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
    values = {name: message.pop(name) for name in WEIGHTS if name in message}
    unread = {name: message[name] for name in TURN_MASKS if name in message}
    for name, value in {**values, **unread}.items():
        if name in unread or value not in (0, 1):
            raise ValueError(f"Turn {position} has `{name}` {value!r}; use a `weight` of 0 or 1.")
        if value == 0:
            message["weight"] = 0


def _text(content: Any, where: str) -> str:
    """Join the parts of a content, since templates for text would print a list."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts: list[Any] = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
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


def read_tools(row: Row) -> list[Any] | None:
    """Read the `tools` of a row, a list of JSON schemas or its JSON; None where it has none.

    Rendering them refuses anything else.
    """
    tools = row.get("tools") or None
    if isinstance(tools, str):
        with suppress(json.JSONDecodeError):
            tools = json.loads(tools)
    return without_nulls(tools) or None


def check_unread(row: Row, read: Iterable[str], texts: Iterable[str] | None) -> None:
    """Raise a ValueError for a column that holds text or a mask and is not read.

    A text that is there already, such as a copy of the first question, is none.

    Args:
        row: of any layout.
        read: the columns that its layout reads.
        texts: that were read; None where tokens were, beside which masks alone count.
    """
    known, parts = {*read, *READ_ELSEWHERE}, list(texts or [])
    joined = "\n".join(parts)
    for name, value in row.items():
        if name in known or value is None or isinstance(value, bool):
            continue
        is_mask = bool(MASK.search(name)) and _is_numbers(value)
        is_mask &= isinstance(value, list) or "label" not in name  # a class of the row
        is_described = name in DESCRIPTIONS or name.endswith(("_id", "_name"))
        words = [] if texts is None or is_described else _texts(value)
        # a rendering of the whole row is no news either
        unread = [t for t in words if t not in joined and not all(part in t for part in parts)]
        if is_mask or unread:
            what = f"{'a mask' if is_mask else 'text'}: {shortened(value)}"
            remedy = "Rename it to one that is (docs/use/data.md), or name it in `ignore_columns`."
            raise ValueError(f"The column `{name}` is not read, but holds {what}. {remedy}")


def _is_numbers(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, int | float) for one in values)


def _texts(value: Any) -> list[str]:
    """Return the texts of more than one word that a value holds."""
    if isinstance(value, str):
        is_text = bool(WORDS.search(value)) or (len(value) > 30 and not value.isascii())
        return [value] if is_text else []
    if isinstance(value, Mapping):
        return [t for key in ("content", "value", "text") for t in _texts(value.get(key))]
    return [t for one in value for t in _texts(one)] if isinstance(value, list) else []
