"""Chat templates: messages rendered as the target is asked, and the options that go with it.

In: messages, a tokenizer. Out: text or token ids, or a ValueError that says what a template cannot
render. Options of a template, such as `enable_thinking`, stay with the tokenizer, which saves them.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

OPTIONS = "chat_template_kwargs"
GIVEN = "chat_template_given"  # whether the template is another than the tokenizer's own
# what templates that write today's date write into training rows: rows of another day are the same
FIXED_DAY = datetime(2025, 1, 1)
DIRECTIVES = [f"%{letter}" for letter in ("A", "a", "B", "b", "d", "H", "I", "j", "M", "m", "p")]
DIRECTIVES += ["%S", "%Y", "%y", "%c", "%x", "%X", "%F", "%T", "%D", "%e", "%-d", "%-m"]


def set_chat_options(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | str | None = None,
) -> PreTrainedTokenizerBase:
    """Give a tokenizer another chat template, or options that its template is rendered with.

    Training, evaluation, regeneration and benchmarks read them from there, `save_pretrained` writes
    them, and a drafter that is trained with them keeps them.

    Args:
        tokenizer: the target's; it is changed.
        chat_template: a template, or the file of one.
        chat_template_kwargs: such as `{"enable_thinking": False}`, or the JSON of it.

    Example:

    ```python
    >>> set_chat_options(tokenizer, chat_template_kwargs={"enable_thinking": False})
    ```
    """
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
        tokenizer.init_kwargs[GIVEN] = True
    if chat_template_kwargs is not None:
        tokenizer.init_kwargs[OPTIONS] = read_options(chat_template_kwargs)
    return tokenizer


def read_template(template: str | Path) -> str:
    """Return a chat template, from its file unless it is given as text."""
    text = str(template)
    if "{" in text:
        return text
    if not Path(text).is_file():
        raise ValueError(f"`chat_template` is {text!r}, neither a file nor a Jinja template.")
    return Path(text).read_text(encoding="utf-8")


def read_options(options: Mapping[str, Any] | str) -> dict[str, Any]:
    """Return options of a template, from JSON if they are text."""
    try:
        return {**(json.loads(options) if isinstance(options, str) else options)}
    except (ValueError, TypeError) as error:
        example = '{"enable_thinking": false}'
        raise ValueError(f"`{OPTIONS}` is {options!r}; give an object: {example}.") from error


def chat_options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the options that a tokenizer's template is rendered with."""
    return dict(tokenizer.init_kwargs.get(OPTIONS) or {})


def keep_chat_options(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Keep in a drafter's config how the chats are rendered that it is trained on."""
    is_given = tokenizer.init_kwargs.get(GIVEN)
    config.chat_template = tokenizer.chat_template if is_given else None
    config.chat_template_kwargs = chat_options(tokenizer) or None


def restore_chat_options(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Render chats as those that a drafter was trained on, but for options that are set already."""
    given = tokenizer.init_kwargs
    template = None if GIVEN in given else getattr(config, "chat_template", None)
    options = None if OPTIONS in given else getattr(config, OPTIONS, None)
    set_chat_options(tokenizer, template, options)


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    tools: list[Any] | None = None,
    today: bool = False,
    **options: Any,
) -> Any:
    """Render messages with the tokenizer's options; the date is a fixed one, or today's.

    `options` are those of `apply_chat_template`, or of the template.

    Raises:
        ValueError: if there is no template, or if it cannot render them.
    """
    given = {**chat_options(tokenizer), **options}
    try:
        template = tokenizer.get_chat_template(given.pop("chat_template", None), tools)
        template = template if today else with_fixed_day(template)
        own = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        if own and given.get("tokenize") is False:
            # what that method calls, without its check of messages that are checked here
            values = {**tokenizer.special_tokens_map, **given, "chat_template": template}
            del values["tokenize"]
            return render_jinja_template([list(messages)], tools, **values)[0][0]
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=template, **given
        )
    except (TemplateError, TypeError, KeyError) as error:
        roles = [turn["role"] for turn in messages]
        raise ValueError(f"The chat template cannot render {roles}: {error}") from error


def with_fixed_day(template: str) -> str:
    """Let a chat template that writes today's date write the fixed one."""
    if "strftime_now" not in template:
        return template
    # a macro hides the function of the same name
    written = "".join(f"|replace('{one}', '{FIXED_DAY:{one}}')" for one in DIRECTIVES)
    return (
        f"{{%- macro strftime_now(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n{template}"
    )
