"""Equal forms of a conversation, of which one is chosen that the chat template renders whole.

In: messages. Out: the first form that the template neither refuses nor leaves a part of out: as it
is, with `arguments` as text, with a developer's turn as the system's, with the system's turn at the
start of the user's, with neighbouring turns of one role joined, with contents as lists of parts.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from reprlib import repr as shortened
from typing import Any

from transformers.utils import logging

from .messages import Message, parse

logger = logging.get_logger(__name__)

# marks that are put into what templates may leave out, to see whether they render it
PROBES = {
    "_coral_call": "`tool_calls`",
    "_coral_result": "the content of `tool` turns",
    "_coral_system": "the content of `system` or `developer` turns",
}


class LeftOutError(ValueError):
    """A template takes messages, but leaves a part of them out or mistakes it."""


def rendered_form(messages: list[Message], render: Callable[..., str]) -> list[Message]:
    """Return the first form of some messages that a chat template renders whole.

    Args:
        messages: of a conversation, or of its start.
        render: a function of messages, which returns their text.

    Raises:
        ValueError: if the template renders none: what the first that it takes lacks, or why it does
            not take the messages as they are.
    """
    errors = list[ValueError]()
    for form in forms_of(messages):
        try:
            check_all_is_rendered(form, render)
        except ValueError as error:
            errors.append(error)
            continue
        if errors and [turn["role"] for turn in form] != [turn["role"] for turn in messages]:
            logger.warning_once(
                "The chat template does not take the roles of some conversations: their turns are"
                " read as ones of another role, or joined (docs/use/data.md)."
            )
        return form
    raise next((error for error in errors if isinstance(error, LeftOutError)), errors[0])


def forms_of(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the different forms of messages, the least changed first."""
    # calls and arguments that are JSON in a string, templates would quote once more
    forms = [[_with_arguments(turn, parse) for turn in messages]]
    yield forms[0]
    changes = (arguments_as_text, developer_as_system, system_within_user, joined_neighbours)
    for change in (*changes, contents_as_parts):
        for form in [change(form) for form in forms]:
            if form not in forms:
                forms.append(form)
    yield from forms[1:]


def arguments_as_text(messages: list[Message]) -> list[Message]:
    """Write the arguments of calls as JSON, for templates that print them as they are."""
    return [_with_arguments(turn, as_text) for turn in messages]


def as_text(value: Any) -> Any:
    """Return the JSON of an object; a string as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _with_arguments(turn: Message, change: Callable[[Any], Any]) -> Message:
    """Change the `arguments` of all calls of a turn."""
    calls = parse(turn.get("tool_calls"))

    def changed(call: Any) -> dict[str, Any]:
        if not isinstance(call, Mapping):
            raise ValueError(f"`tool_calls` is {shortened(calls)}, and not a list of calls.")
        inner = {"function": changed, "arguments": change}  # of OpenAI's layout, and of others
        return {name: inner[name](part) if name in inner else part for name, part in call.items()}

    return {**turn, "tool_calls": [changed(call) for call in calls]} if calls else turn


def developer_as_system(messages: list[Message]) -> list[Message]:
    """Make a developer's turns the system's."""
    return [{**t, "role": "system"} if t["role"] == "developer" else t for t in messages]


def system_within_user(messages: list[Message]) -> list[Message]:
    """Put a system's turn that opens a conversation at the start of the user's that follows."""
    roles = [turn["role"] for turn in messages[:2]]
    if roles != ["system", "user"]:
        return messages
    system, user, *others = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]


def joined_neighbours(messages: list[Message]) -> list[Message]:
    """Join turns of one role that follow each other, with an empty line between them."""
    joined = list[Message]()
    for turn in messages:
        last = joined[-1] if joined else {}
        is_same = {**last, "content": ""} == {**turn, "content": ""}
        if is_same and turn["role"] != "tool" and {*turn} <= {"role", "content", "weight"}:
            joined[-1] = {**turn, "content": f"{last['content']}\n\n{turn['content']}"}
        else:
            joined.append(turn)
    return joined


def contents_as_parts(messages: list[Message]) -> list[Message]:
    """Write contents as lists of parts, for templates of targets that read images too."""
    return [{**t, "content": as_parts(t["content"])} if "content" in t else t for t in messages]


def as_parts(text: str) -> list[dict[str, str]]:
    """Return a text as the only part of a content."""
    return [{"type": "text", "text": text}]


def text_of(turn: Message) -> str:
    """Return the text of a turn's content, in either form; one with calls may have none."""
    content = turn.get("content") or ""
    return content if isinstance(content, str) else content[0]["text"]


def check_all_is_rendered(messages: list[Message], render: Callable[..., str]) -> None:
    """Raise a ValueError if a template refuses messages, or silently leaves a part of them out.

    The conversation is rendered with other names, results and instructions, which must show.
    """
    probed = [_probe(turn) for turn in messages]
    text = render(probed)
    for probe, what in PROBES.items():
        if probe in str(probed) and probe not in text:
            raise LeftOutError(
                f"The chat template leaves out {what}; use another, or drop the row."
            )
    for turn in messages:
        for call in turn.get("tool_calls") or []:
            arguments = call.get("function", call).get("arguments")
            if isinstance(arguments, dict) and arguments and str(arguments) in text:
                remedy = "give them as text, as JSON"
                raise LeftOutError(f"The template prints the arguments as Python does; {remedy}.")


def _probe(turn: Message) -> Message:
    """Put probes into the names of a turn's calls, and behind instructions and results."""
    call, result, system = PROBES
    calls = turn.get("tool_calls") or []
    if calls:
        # OpenAI's layout keeps the name under `function`, others at the top
        renamed = [
            {**one, "name": call, "function": {**one.get("function", {}), "name": call}}
            for one in calls
        ]
        return {**turn, "tool_calls": renamed}
    probe = {"tool": result, "system": system, "developer": system}.get(turn["role"])
    if not probe or not turn.get("content"):
        return turn
    text = text_of(turn) + probe
    return {**turn, "content": text if isinstance(turn["content"], str) else as_parts(text)}
