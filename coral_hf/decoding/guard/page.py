"""The page of the docs that lists all tables of the guard, as Markdown."""

from ..preparation import tables as preparation_tables
from . import adapters, target_tables
from .calls import tables as call_tables
from .entries import Entry, Way

HEAD = """\
# What is drafted, and what is refused

The output of `target.generate(..., assistant_model=drafter)` is the target's own. Before the first
pass, a guard looks up what target and call have, and decides: a **tree** where it is exact, else a
**chain**, else the call is **refused** with a `ValueError` that names the reason. The lowest of all
that applies wins, and what is in no table is refused or tried. `CoralDrafter.from_target` and
`CoralTrainer` ask the same guard: nobody trains a drafter for a target that `generate` refuses.

*Agreement only*: a layer of the target looks at all tokens of a pass, so that its text agrees with
plain `generate` but for near ties; that is said once.

Each line names the test that holds it. `python -m coral_hf.decoding.guard > docs/guard.md` writes
this page.
"""
WORDS = {Way.TREE: "tree", Way.CHAIN: "chain", Way.REFUSED: "refused"}


def guard_page() -> str:
    """The page."""
    modules = target_tables, adapters, preparation_tables, call_tables
    tables = {title: table for module in modules for title, table in module.TABLES.items()}
    return HEAD + "".join(_section(title, table) for title, table in tables.items())


def _section(title: str, table: dict[str, Entry]) -> str:
    lines = [_line(name, entry) for name, entry in table.items()]
    return f"\n## {title}\n\n| | drafts | because | test |\n|---|---|---|---|\n" + "".join(lines)


def _line(name: str, entry: Entry) -> str:
    said = entry.said("…").replace("|", "\\|")
    shown = name.replace("|", "\\|")
    way = WORDS[entry.way] + (", agreement only" if entry.note else "")
    return f"| `{shown}` | {way} | {said} | `{entry.test}` |\n"
