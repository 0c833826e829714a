"""The guard's tables as a page: `python docs/site/guard_page.py > docs/reference/guard.md`."""

from coral_hf.decoding import watchers
from coral_hf.decoding.guard.entries import TABLES, Entry, Table, Way

HEAD = """\
# What is drafted, and what is refused

The output of `target.generate(..., assistant_model=drafter)` is the target's own. Before the first
pass, a guard looks up what target and call have, and decides: a **tree** where it is exact, else a
**chain**, else the call is **refused** with a `ValueError` that names the reason. The lowest of all
that applies wins, and what is in no table is refused or tried. `CoralDrafter.from_target` and
`CoralTrainer` ask the same guard: nobody trains a drafter for a target that `generate` refuses.

*Agreement only*: a layer of the target looks at all tokens of a pass, so that its text agrees with
plain `generate` but for near ties; that is said once.

Each line names the test that holds it. This page is written by
`python docs/site/guard_page.py > docs/reference/guard.md`.
"""
WORDS = {Way.TREE: "tree", Way.CHAIN: "chain", Way.REFUSED: "refused"}
# lines of the tables that stand for classes of transformers
CLASSES = {
    "those that remember": watchers.STATEFUL,
    "those of the batch": set(watchers.STATELESS) - {*watchers.ROW_WISE},
    "those of one row": set(watchers.ROW_WISE) - {*watchers.PREFIX_FREE},
    "those of logits alone": watchers.PREFIX_FREE,
    "criteria of one row": watchers.ROW_WISE_CRITERIA,
}


def guard_page() -> str:
    """The page."""
    return HEAD + "".join(_section(title, table) for title, table in TABLES.items())


def _section(title: str, table: Table) -> str:
    names: dict[Entry, list[str]] = {}
    for name, entry in table.items():
        classes = sorted(one.__name__ for one in CLASSES.get(name, ()))
        names.setdefault(entry, []).extend(classes or [name])
    lines = [_line(shown, entry) for entry, shown in names.items()]
    return f"\n## {title}\n\n| | drafts | because | test |\n|---|---|---|---|\n" + "".join(lines)


def _line(names: list[str], entry: Entry) -> str:
    shown = ", ".join(f"`{name}`" for name in names).replace("|", "\\|")
    way = WORDS[entry.way] + (", agreement only" if entry.note else "")
    said = entry.said("…").replace("|", "\\|")
    return f"| {shown} | {way} | {said} | `{entry.test}` |\n"


if __name__ == "__main__":
    print(guard_page(), end="")
