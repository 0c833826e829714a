"""Chat templates: messages and tools as text or tokens.

In: messages, tools, a tokenizer. Out: what `apply_chat_template` returns, or a ValueError that says
what the template cannot render.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from reprlib import repr as shortened
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .messages import Message, Row, without_nulls

GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# marks that are put into tool calls and results, to see whether a template renders them
PROBES = {"_coral_call": "`tool_calls`", "_coral_result": "the content of `tool` turns"}


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
    """Check whether a template itself marks what the target writes."""
    return bool(GENERATION_BLOCK.search(tokenizer.get_chat_template(tools=tools)))


def read_tools(row: Row) -> list[Any] | None:
    """Read the `tools` of a row, a list of JSON schemas or its JSON; None where it has none."""
    tools = row.get("tools") or None
    if isinstance(tools, str):
        with suppress(json.JSONDecodeError):
            tools = json.loads(tools)
    if tools is not None and not isinstance(tools, list):
        raise ValueError(
            f"`tools` is {shortened(tools)}; expected a list of JSON schemas, or its JSON."
        )
    return without_nulls(tools) or None


def check_tools_are_rendered(messages: list[Message], render: Callable[..., Any]) -> None:
    """Raise a ValueError if a template silently leaves out tool calls or their results.

    The conversation is rendered with other names and results, which must show.
    """
    probed = [_probe(turn) for turn in messages]
    if probed == messages:
        return
    text = render(probed, tokenize=False)
    for probe, what in PROBES.items():
        if probe in str(probed) and probe not in text:
            raise ValueError(
                f"The chat template leaves out {what}; set `tokenizer.chat_template` to one that"
                " renders them, or drop such rows with `dataset.filter`."
            )


def _probe(turn: Message) -> Message:
    """Put probes into the names of a turn's calls and the end of a tool's result."""
    call, result = PROBES
    calls = turn.get("tool_calls") or []
    if not all(isinstance(one, Mapping) for one in calls):
        raise ValueError(f"`tool_calls` is {shortened(calls)}; expected objects with a `function`.")
    if calls:
        # OpenAI's layout keeps the name under `function`, others at the top
        renamed = [
            {**one, "name": call, "function": {**one.get("function", {}), "name": call}}
            for one in calls
        ]
        return {**turn, "tool_calls": renamed}
    if turn["role"] == "tool" and turn.get("content"):
        return {**turn, "content": turn["content"] + result}
    return turn
