"""Every class of transformers: exactly its own text with a drafter, or a refusal that says why."""

import re
from pathlib import Path

import pytest
import transformers
from every_class import Finding, all_classes, class_name, find

PAGE = Path(__file__).parents[1] / "docs" / "results" / "targets.md"
pytestmark = pytest.mark.slow


def lines() -> set[str]:
    """The lines of the page in the docs, if it is of the version that is installed."""
    text = PAGE.read_text() if PAGE.exists() else ""
    return set(text.splitlines()) if f"transformers {transformers.__version__}." in text else set()


def pytest_generate_tests(metafunc):
    # to know the classes is to import all of them, which takes seconds
    is_left_out = "not slow" in metafunc.config.option.markexpr
    pairs = [] if is_left_out else all_classes()
    ids = [f"{class_name(*pair)}-{pair[1].model_type}" for pair in pairs]
    metafunc.parametrize("pair", pairs, ids=ids)


def test_a_class_keeps_its_own_text_or_is_refused_in_a_sentence(pair):
    found: Finding = find(*pair)
    assert found.way not in ("wrong", "crash"), found
    if found.way in ("chain", "refused"):
        assert re.fullmatch(r"[^\n]{10,300}", found.reason), found
    assert not lines() or found.line in lines()
