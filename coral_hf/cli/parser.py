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

Command = Callable[..., None]
EXTRA = "training_options"  # the parameter of a command that takes options of `Trainer` too


def parse(name: str, command: Command, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a command, by the names of its parameters.

    Words that are no option of ours go to the parameter `training_options` where the command has
    it, and are an error elsewhere.
    """
    parser = make_parser(name, command)
    # `--max-length` is our spelling; `--max_length`, that of transformers' scripts, is read as well
    words = [re.sub("^--[^=]+", lambda found: found[0].replace("_", "-"), word) for word in words]
    every = [one for kind in settings_of(command).values() for one in fields(kind)]
    # a list without a name may stand before and behind options
    is_mixed = any(one.metadata.get("positional") and is_list(one) for one in every)
    parse_words = parser.parse_known_intermixed_args if is_mixed else parser.parse_known_args
    known, others = parse_words(words)
    typed, arguments = vars(known), dict[str, Any]()
    flags = {one.name: flag(one) for one in every}
    if EXTRA in get_type_hints(command):
        arguments[EXTRA] = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    for parameter, kind in settings_of(command).items():
        chosen = [one for one in fields(kind) if one.name in typed]
        for one in chosen:
            check(parser, one, typed, flags)
        arguments[parameter] = kind(**{one.name: typed[one.name] for one in chosen})
    return arguments


def check(
    parser: argparse.ArgumentParser, one: Field[Any], typed: dict[str, Any], flags: dict[str, str]
) -> None:
    """Exit with an error if an option is too small, lacks one that it needs, or excludes one."""
    rules, value = one.metadata, typed[one.name]
    smallest = min(value) if isinstance(value, list) else value
    if "least" in rules and smallest < rules["least"]:
        parser.error(f"argument {flag(one)}: {smallest} is too small; use {rules['least']} or more")
    for rule, verdict in {"needs": "goes with", "excludes": "does not go with"}.items():
        for other in rules.get(rule, "").split():
            if (other in typed) == (rule == "excludes"):
                parser.error(f"{flag(one)} {verdict} {flags[other]}")


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
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text(one)}
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    if get_origin(kind) is list:
        settings["action"], kind = "append", get_args(kind)[0]
    if get_origin(kind) is Literal:
        settings["choices"] = get_args(kind)
    elif kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings["type"] = kind
    if one.metadata.get("positional"):
        if settings.pop("action", None) == "append":
            settings["nargs"] = "*"
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
    is_named_list = is_list(one) and not one.metadata.get("positional")
    repeated = " May be repeated." if is_named_list else ""
    return (one.metadata["help"] + repeated + shown).replace("%", "%%")


def is_list(one: Field[Any]) -> bool:
    """Whether a field holds several values."""
    return str(one.type).startswith("list[")
