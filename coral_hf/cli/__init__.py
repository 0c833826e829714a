"""The program `coral-hf`: its commands, grouped by what a user wants to do.

In: the words of a command line. Out: what a command prints and writes. A command is a function of
dataclasses, whose fields are its options; it imports torch when it runs.
"""

import argparse
import inspect
import logging
import os
import sys
from collections.abc import Sequence

from .data import data, features, regenerate
from .measure import autotune, benchmark, compare, demo, generate, playground, verify
from .parser import Command, parse
from .publish import export, import_, publish
from .reproduce import reproduce
from .train import distill, plan, train

GROUPS: dict[str, list[Command]] = {
    "try": [demo],
    "train": [plan, train, distill, data, regenerate, features],
    "use": [generate, playground],
    "measure": [verify, benchmark, compare, autotune, reproduce],
    "publish": [publish, import_, export],
}


def name_of(command: Command) -> str:
    """Return the name by which a command is typed."""
    return command.__name__.strip("_").replace("_", "-")


COMMANDS = {name_of(command): command for commands in GROUPS.values() for command in commands}


def main(words: Sequence[str] | None = None) -> None:
    """Run the command that is named by `words`, those of the command line by default."""
    parser = argparse.ArgumentParser(
        "coral-hf",
        description="Speculative decoding with CORAL drafters.",
        epilog=overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    typed = parser.parse_args(words)
    try:
        run(typed.command, typed.words)
    except BrokenPipeError:
        # the reader of the output has gone; what Python still flushes when it exits goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError) as error:  # input that cannot be used
        if typed.traceback:
            raise
        parser.exit(1, f"Error: {error}\n")


def run(name: str, words: Sequence[str]) -> None:
    """Run one command with the options that were typed."""
    arguments = parse(name, COMMANDS[name], words)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("coral_hf").setLevel(logging.INFO)
    for noisy in ("torchao", "torch.utils._pytree"):  # when transformers imports torchao
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from .. import register

    register()
    COMMANDS[name](**arguments)


def overview() -> str:
    """Return the commands, a group at a time, each with the first line of its docstring."""
    lines = ["commands (for their options: coral-hf COMMAND --help):"]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name_of(one):15}{inspect.getdoc(one)}".splitlines()[0] for one in commands]
    return "\n".join(lines)
