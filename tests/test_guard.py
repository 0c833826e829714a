"""The guard's tables: every line has a reason and a test, and the page of the docs lists all."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from coral_hf.decoding.guard import CHAIN, REFUSED, TREE, Entry, Judgement
from coral_hf.decoding.guard.entries import TABLES, judge

TESTS = Path(__file__).parent
SITE = TESTS.parent / "docs" / "site" / "guard_page.py"
site = SimpleNamespace(**runpy.run_path(str(SITE)))


@pytest.fixture(scope="module")
def names() -> set[str]:
    """The names of all tests."""
    return {
        name
        for path in TESTS.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("title", TABLES)
def test_every_entry_has_a_reason_and_names_a_test_that_exists(title, names):
    for name, entry in TABLES[title].items():
        assert entry.way in (TREE, CHAIN, REFUSED)
        assert entry.said(name) and "\n" not in entry.said(name), name
        assert entry.test in names, name


def test_a_line_for_several_classes_is_in_a_table():
    assert site.CLASSES.keys() <= {name for table in TABLES.values() for name in table}


def test_the_page_of_the_docs_is_what_the_tables_say():
    page = (TESTS.parent / "docs" / "reference" / "guard.md").read_text()
    assert page == site.guard_page(), f"run `python {SITE} > docs/reference/guard.md`"


def test_the_lowest_way_of_all_that_was_found_wins():
    found = [("a", Entry(TREE, "fine")), ("b", Entry(CHAIN, "no tree for {name}"))]
    assert judge(found) == Judgement(CHAIN, ("no tree for b",))
    both = judge(found) & judge([("c", Entry(REFUSED, "no {name}", "drop {name}"))])
    assert both == Judgement(REFUSED, ("no c; drop c", "no tree for b"))
    assert both.obstacle == "no c; drop c"
    assert judge([]).obstacle is None
