"""Layouts of a dataset's rows: which columns hold what the target reads and writes.

In: a row. Out: the name of its layout; its turns, or its prompt and text; a ValueError that names a
column with text or a mask that this layout does not read.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from reprlib import repr as shortened
from typing import Any, NamedTuple

Row = Mapping[str, Any]

TOKENS = ("token_rows", "input_ids")  # layouts of rows that are tokens
# what is nearest to the trainer's input goes first
LAYOUTS = (*TOKENS, "messages", "conversations", "completion", "chosen", "instruction", "text")
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


class Turns(NamedTuple):
    """The turns of a row, and the columns that they were read from."""

    turns: list[Any]
    columns: set[str]


def layout_of(row: Row) -> str:
    """Name the layout of a row: the column that it is read by."""
    columns = [column for column, value in row.items() if value is not None]
    needs = {"completion": ("prompt",), "instruction": ANSWERS}
    for layout in LAYOUTS:
        if layout not in columns or (layout == "token_rows" and not row[layout]):
            continue
        if layout == "chosen" and isinstance(row[layout], str) and "prompt" not in columns:
            continue
        if layout not in needs or set(needs[layout]) & {*columns}:
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
    return layout == "text" or (
        layout in ("completion", "chosen") and all(isinstance(part, str) for part in pair)
    )


def read_text(row: Row) -> tuple[str, str]:
    """Return the prompt of a row of plain text, which is not trained, and the text after it."""
    layout = layout_of(row)
    prompt, text = "" if layout == "text" else row["prompt"], row[layout]
    if not isinstance(text, str):
        raise ValueError(f"`{layout}` is {shortened(text)}; expected a str.")
    check_unread(row, {layout, "rejected", *(["prompt"] if prompt else [])}, [text])
    return prompt, text


def read_turns(row: Row) -> Turns:
    """Return the turns of a conversation, in the form in which its layout has them.

    Raises:
        ValueError: for a row that is no conversation.
    """
    # messages stand beside tokens that were kept of them
    layout = layout_of({name: row[name] for name in row if name != "token_rows"})
    if layout in ("text", "input_ids") or is_plain_text({**row, "token_rows": None}):
        raise ValueError(f"A row of `{layout}` is no conversation; pass it to `tokenize` as it is.")
    if layout == "instruction":
        found = _instruction(row)
    elif layout in ("completion", "chosen"):
        found = _completion(row, layout)
    else:
        found = Turns(_listed(row[layout], layout), {layout})
        if isinstance(row.get("chosen"), Mapping):
            found = Turns([*found.turns, row["chosen"]], {*found.columns, "chosen", "rejected"})
    instructions = [name for name in SYSTEM if row.get(name)]
    for name in instructions:
        found.turns.insert(0, {"role": "system", "content": row[name]})
    return Turns(found.turns, {*found.columns, *instructions})


def _listed(turns: Any, layout: str) -> list[Any]:
    """Return a list of turns."""
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError(
            f"`{layout}` is {shortened(turns)}, not a list of turns; read JSON that is kept as text"
            " with `json.loads`."
        )
    if not turns:
        raise ValueError(f"`{layout}` has no turns; drop such rows with `dataset.filter`.")
    return list(turns)


def _instruction(row: Row) -> Turns:
    """Read Alpaca's layout, with `input` or Dolly's `context`, and LLaMA-Factory's `history`."""
    parts = [name for name in ("instruction", "input", "context") if row.get(name)]
    answer = next(name for name in ANSWERS if row.get(name) is not None)
    turns = []
    for pair in row.get("history") or []:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"`history` has {shortened(pair)}; expected [question, answer].")
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    question = "\n\n".join(row[name] for name in parts)
    turns += [_turn("user", question), _turn("assistant", row[answer])]
    return Turns(turns, {*parts, "history", answer})


def _completion(row: Row, layout: str) -> Turns:
    """Read a prompt and its answer, of which the last is trained; a `rejected` answer is not read.

    A `chosen` conversation may hold its own prompt.
    """
    prompt, answer = row.get("prompt"), row[layout]
    if isinstance(answer, str):
        answer = [_turn("assistant", answer)]
    turns = [answer] if isinstance(answer, Mapping) else _listed(answer, layout)
    first = turns[0].get("role", turns[0].get("from")) if isinstance(turns[0], Mapping) else None
    if isinstance(prompt, str) and first == "assistant":
        turns = [_turn("user", prompt), *turns]
    elif prompt is not None and not isinstance(prompt, str):
        asked = [{**turn, "weight": 0} if _is_answer(turn) else turn for turn in prompt]
        turns = [*asked, *turns]
    read = {"prompt"} if prompt is not None and not isinstance(prompt, str) else set()
    return Turns(turns, {layout, "rejected", *read})


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") == "assistant"


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def check_unread(row: Row, read: Iterable[str], texts: Iterable[str]) -> None:
    """Raise a ValueError for a column that holds text or a mask and is not read.

    A text that is there already, such as a copy of the first question, is none.

    Args:
        row: of any layout.
        read: the columns that its layout reads.
        texts: that were read.
    """
    known, texts = {*read, *READ_ELSEWHERE}, list(texts)
    joined = "\n".join(texts)
    for name, value in row.items():
        if name in known or value is None or isinstance(value, bool):
            continue
        is_mask = bool(MASK.search(name)) and _is_numbers(value)
        is_mask &= isinstance(value, list) or "label" not in name  # a class of the row
        words = [] if name in DESCRIPTIONS or name.endswith(("_id", "_name")) else _texts(value)
        # a rendering of the whole row is no news either
        unread = [t for t in words if t not in joined and not all(part in t for part in texts)]
        if is_mask or unread:
            raise ValueError(
                f"The column `{name}` is not read, but holds {'a mask' if is_mask else 'text'}:"
                f" {shortened(value)}. Rename it to one that is (docs/use/data.md), or name it in"
                " `ignore_columns`."
            )


def check_masks(row: Row, read: Iterable[str]) -> None:
    """Raise a ValueError for a mask beside tokens that is not read."""
    check_unread({name: row[name] for name in row if _is_numbers(row[name])}, read, [])


def _is_numbers(value: Any) -> bool:
    if isinstance(value, int | float):
        return not isinstance(value, bool)
    return isinstance(value, list) and all(isinstance(one, int | float) for one in value)


def _texts(value: Any) -> list[str]:
    """Return the texts of more than one word that a value holds."""
    if isinstance(value, str):
        is_text = bool(WORDS.search(value)) or (len(value) > 30 and not value.isascii())
        return [value] if is_text else []
    if isinstance(value, Mapping):
        return [t for key in ("content", "value", "text") for t in _texts(value.get(key))]
    return [t for one in value for t in _texts(one)] if isinstance(value, list) else []
