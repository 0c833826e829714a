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
MASK = re.compile(r"(^|_)(masks?|labels|weights?|loss|train|trained)($|_)")
WORDS = re.compile(r"[^\W\d_]\S*\s+\S*[^\W\d_]|[^\x00-\x7f]{9}")  # more than a name
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
    is_pair = isinstance(row.get("chosen"), str)
    needs = {"completion": ["prompt"], "instruction": ANSWERS, "chosen": ["prompt"] * is_pair}
    for layout in LAYOUTS:
        is_empty = layout == "token_rows" and not row.get(layout)
        needed = needs.get(layout) or [layout]
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
    found = {name: message.pop(name) for name in (*WEIGHTS, *TURN_MASKS) if name in message}
    for name, value in found.items():
        if name in TURN_MASKS or value not in (0, 1):
            raise ValueError(f"Turn {position} has `{name}` {value!r}; use a `weight` of 0 or 1.")
    if 0 in found.values():
        message["weight"] = 0


def _text(content: Any, where: str) -> str:
    """Join the parts of a content, since templates for text would print a list."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    known = [part for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    texts = [part["text"] for part in known if isinstance(part.get("text"), str)]
    if len(texts) < len(parts):
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


def parse(value: Any) -> Any:
    """Return the object that a string is the JSON of; anything else as it is."""
    with suppress(json.JSONDecodeError):
        found = json.loads(value) if isinstance(value, str) else None
        return found if isinstance(found, dict | list) else value
    return value


def read_tools(row: Row) -> list[Any] | None:
    """Read the `tools` of a row, a list of JSON schemas or its JSON; None where it has none.

    Rendering them refuses anything else.
    """
    return without_nulls(parse(row.get("tools"))) or None


def check_unread(row: Row, read: Iterable[str], texts: Iterable[str] | None) -> None:
    """Raise a ValueError for a column that holds text or a mask and is not read.

    A text that is there already, such as a copy of the first question, is none; nor is one of the
    whole row.

    Args:
        row: of any layout.
        read: the columns that its layout reads.
        texts: that were read; None where tokens were, beside which masks alone count.
    """
    known, parts = {*read, *READ_ELSEWHERE}, list(texts or [])
    joined = "\n".join(parts)
    for name, value in row.items():
        if name in known or isinstance(value, bool):
            continue
        is_mask = MASK.search(name) and isinstance(value, int | float | list)
        is_described = texts is None or name in DESCRIPTIONS or name.endswith(("_id", "_name"))
        is_text = not is_described and isinstance(value, str) and WORDS.search(value)
        is_known = is_text and (value in joined or all(part in value for part in parts))
        if is_mask or (is_text and not is_known):
            what = f"{'a mask' if is_mask else 'text'}: {shortened(value)}"
            remedy = "Rename it to one that is (docs/use/data.md), or `remove_columns`."
            raise ValueError(f"The column `{name}` is not read, but holds {what}. {remedy}")
