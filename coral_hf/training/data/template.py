"""Chat templates: messages and tools as text or tokens.

In: messages, tools, a tokenizer. Out: what `apply_chat_template` returns, or a ValueError that says
what the template cannot render.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .messages import Message, Row, shown, without_nulls

GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PROBE = "_coral_probe"


def render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None, **options
) -> Any:
    """Render messages; `options` are those of `apply_chat_template`.

    Raises:
        ValueError: if there is no template, or if it cannot render them.
    """
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, **options)
    except (TemplateError, TypeError, KeyError) as error:
        roles = [turn["role"] for turn in messages]
        raise ValueError(f"The chat template cannot render {roles}: {error}") from error


def has_generation_block(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None) -> bool:
    """Whether a template marks itself what the target writes."""
    return bool(GENERATION_BLOCK.search(tokenizer.get_chat_template(tools=tools)))


def read_tools(row: Row) -> list[Any] | None:
    """Read the `tools` of a row, a list of JSON schemas or its JSON; None where it has none."""
    tools = row.get("tools") or None
    if isinstance(tools, str):
        with suppress(json.JSONDecodeError):
            tools = json.loads(tools)
    if tools is not None and not isinstance(tools, list):
        raise ValueError(
            f"`tools` is {shown(tools)}; expected a list of JSON schemas, or its JSON."
        )
    return without_nulls(tools) or None


def check_tools_are_rendered(messages: list[Message], render: Callable[..., Any]) -> None:
    """Raise a ValueError if a template silently leaves out tool calls or their results.

    It is rendered twice, the second time with other names or results, which must show.
    """
    for key, other, what in (
        ("tool_calls", _other_calls, "`tool_calls`"),
        ("content", _other_result, "the content of `tool` turns"),
    ):
        changed = [{**turn, key: other(turn)} if other(turn) else turn for turn in messages]
        if changed == messages:
            continue
        if render(messages, tokenize=False) == render(changed, tokenize=False):
            raise ValueError(
                f"The chat template leaves out {what}; set `tokenizer.chat_template` to one that"
                " renders them, or drop such rows with `dataset.filter`."
            )


def _other_calls(turn: Message) -> list[Message]:
    """The calls of a turn, to a function of another name."""
    calls = turn.get("tool_calls") or []
    if not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"`tool_calls` is {shown(calls)}; expected objects with a `function`.")
    # OpenAI's layout keeps the name under `function`, others at the top
    return [
        {**call, "name": PROBE, "function": {**call.get("function", {}), "name": PROBE}}
        for call in calls
    ]


def _other_result(turn: Message) -> str:
    """What a turn of a tool holds, with another end."""
    return turn["content"] + PROBE if turn["role"] == "tool" and turn.get("content") else ""
