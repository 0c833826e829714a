"""Command-line options made from dataclasses: a field is an option, its metadata the help text.

In: a function whose parameters are annotated with dataclasses, and the words a user typed. Out: the
function's arguments. Imports neither torch nor transformers, so that `--help` answers at once.
"""

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..measure.settings import check_least

Command = Callable[..., None]
EXTRA = "training_options"  # the parameter of a command that takes options of `Trainer` too
RULES = {"needs": "goes with", "excludes": "does not go with"}


def parse(name: str, command: Command, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a command, by the names of its parameters.

    Words that are no option of ours go to the parameter `training_options` where the command has
    it, and are an error elsewhere.
    """
    parser, kinds = make_parser(name, command), settings_of(command)
    # `--max-length` is our spelling; `--max_length`, that of transformers' scripts, is read as well
    words = [re.sub("^--[^=]+", lambda found: found[0].replace("_", "-"), word) for word in words]
    options = {one.name: one for kind in kinds.values() for one in fields(kind)}
    known, others = parser.parse_known_args(words)
    typed, arguments = vars(known), dict[str, Any]()
    if EXTRA in get_type_hints(command):
        arguments[EXTRA] = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    for one in (options[name] for name in typed):
        for rule, verdict in RULES.items():
            for other in one.metadata.get(rule, "").split():
                if (other in typed) == (rule == "excludes"):
                    parser.error(f"{flag(one)} {verdict} {flag(options[other])}")
    for parameter, kind in kinds.items():
        own = {one.name: typed[one.name] for one in fields(kind) if one.name in typed}
        arguments[parameter] = kind(**own)
        check_least(arguments[parameter])
    return arguments


def flag(one: Field[Any]) -> str:
    """Return the name of the option of a field."""
    return "--" + one.metadata.get("flag", one.name).replace("_", "-")


def make_parser(name: str, command: Command) -> argparse.ArgumentParser:
    """Return a parser of the fields of all dataclasses that a command takes."""
    parser = argparse.ArgumentParser(
        f"coral-hf {name}",
        description=inspect.getdoc(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # an option that two dataclasses have is added once; fields without help are set from Python
    kinds = settings_of(command).values()
    options = {one.name: (one, kind) for kind in kinds for one in fields(kind) if one.metadata}
    actions = [
        add_option(parser, one, get_type_hints(kind)[one.name]) for one, kind in options.values()
    ]
    required = [[*one.option_strings, one.dest.upper()] for one in actions if one.required]
    parser.usage = " ".join([parser.prog, *sum(required, []), "[options]"])
    return parser


def settings_of(command: Command) -> dict[str, Any]:
    """Return the dataclasses of a command's parameters, by the parameters' names."""
    return {name: kind for name, kind in get_type_hints(command).items() if is_dataclass(kind)}


def add_option(parser: argparse.ArgumentParser, one: Field[Any], kind: Any) -> argparse.Action:
    """Add the option of one dataclass field; what is not typed is left to the field's default."""
    is_positional = one.metadata.get("positional")
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text(one)}
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    if get_origin(kind) is list:
        settings["action"] = "append"
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        settings["choices"] = get_args(kind)
    elif kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings["type"] = kind
    if is_positional:
        return parser.add_argument(one.name, **settings)
    settings["required"] = one.default is MISSING and one.default_factory is MISSING
    return parser.add_argument(flag(one), dest=one.name, **settings)


def help_text(one: Field[Any]) -> str:
    """Return the help of a field, with its default unless that says nothing."""
    default = one.default
    if one.default_factory is not MISSING:
        default = " ".join(map(str, one.default_factory()))
    says_nothing = default in (MISSING, None, "") or isinstance(default, bool)
    shown = "" if says_nothing else f" Default: {default}."
    if str(one.type).startswith("list["):
        shown = f" May be repeated.{shown}"
    return (one.metadata["help"] + shown).replace("%", "%%")
