"""Ways to draft, and what is known of one thing that a target or a call may have.

In: findings, each an `Entry` of tables.yaml. Out: a `Judgement`, in which the lowest way wins.
"""

from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import yaml


class Way(IntEnum):
    """How a call drafts; a lower way is the safer one."""

    REFUSED = 0
    CHAIN = 1
    TREE = 2


REFUSED, CHAIN, TREE = Way


class Entry(NamedTuple):
    """What is known of one thing that a target or a call may have."""

    way: Way  # the highest that is exact
    reason: str  # why it is safe, or what is unsafe; `{name}` stands for what was found
    remedy: str = ""  # what to do instead
    test: str = ""  # the test that holds it
    note: str = ""  # what is true of the output, where it is not the same to the last digit

    def said(self, name: object = "") -> str:
        """The reason and the remedy, of what was found."""
        parts = [self.reason.format(name=name), self.remedy.format(name=name)]
        return "; ".join(part for part in parts if part)


Table = dict[str, Entry]  # by name, as transformers or PEFT spells it
Finding = tuple[object, Entry]  # what was found, and what is known of it
Findings = Iterator[Finding]


def _read_tables() -> dict[str, Table]:
    """Read tables.yaml, whose keys are names with commas between them."""
    text = Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8")
    tables: dict[str, Table] = {}
    for title, table in yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)).items():
        tables[title] = entries = {}
        for names, fields in table.items():
            way = next(way for way in Way if way.name.lower() in fields)
            entry = Entry(way, fields.pop(way.name.lower()), **fields)
            entries.update(dict.fromkeys(names.split(", "), entry))
    return tables


TABLES = _read_tables()


def finding(title: str, name: str, found: object = None) -> Finding:
    """Look up a name in a table, or what it says of any other.

    Args:
        found: what the reason names, if that is not `name`.
    """
    table = TABLES[title]
    return name if found is None else found, table.get(name) or table["any other"]


class Judgement(NamedTuple):
    """What a target or a call allows."""

    way: Way = TREE
    reasons: tuple[str, ...] = ()  # of all that holds it below a tree, the lowest way first
    notes: tuple[str, ...] = ()  # what is true of the output, said once in a process
    keeps_rows: bool = False  # whether rows that have ended stay in the pass

    @property
    def obstacle(self) -> str | None:
        """Why no tree can be verified, if none can."""
        return None if self.way == TREE else self.reasons[0]

    def accepted(self, subject: str = "") -> "Judgement":
        """Itself, or a ValueError that begins with a `subject` if it is a refusal."""
        if self.way == REFUSED:
            raise ValueError(f"{subject}{self.reasons[0]}.")
        return self

    def __and__(self, other: "Judgement") -> "Judgement":
        """What two judgements allow together."""
        low, high = sorted((self, other), key=lambda one: one.way)
        notes, keeps_rows = self.notes + other.notes, self.keeps_rows or other.keeps_rows
        return Judgement(low.way, low.reasons + high.reasons, notes, keeps_rows)


def judge(findings: Iterable[Finding]) -> Judgement:
    """The judgement of all that was found, each with its name."""
    found = list(findings)
    low = [(entry.way, entry.said(name)) for name, entry in found if entry.way < TREE]
    low = sorted(dict.fromkeys(low), key=lambda one: one[0])
    notes = [f"{entry.said(name)}: {entry.note}" for name, entry in found if entry.note]
    reasons = tuple(said for _, said in low)
    return Judgement(low[0][0] if low else TREE, reasons, tuple(notes))
