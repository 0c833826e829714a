"""The seam to chat templates: messages as text or tokens, what goes wrong as a ValueError.

In: messages, tools, a tokenizer. Out: what `apply_chat_template` returns.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .messages import Message

GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None, **options
) -> Any:
    """Render messages; `options` are those of `apply_chat_template`.

    Raises:
        ValueError: if there is no template, or if it cannot render them.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "The tokenizer has no chat template; set `tokenizer.chat_template` to the one that the"
            " target is used with, or give `text` rows."
        )
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, **options)
    except (TemplateError, TypeError, KeyError) as error:
        roles = [turn["role"] for turn in messages]
        raise ValueError(f"The chat template cannot render {roles}: {error}") from error


def has_generation_block(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None) -> bool:
    """Whether a template says itself what the target writes."""
    return bool(GENERATION_BLOCK.search(tokenizer.get_chat_template(tools=tools)))
