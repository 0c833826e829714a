"""The commands that README and docs show are ones that the program takes."""

import re
import shlex
from pathlib import Path

import pytest

from coral_hf.cli import COMMANDS
from coral_hf.cli.parser import parse
from coral_hf.training import parse_arguments

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# their further options are those of the trainer
TRAINING = {"train", "compare", "compare-heads"}


def commands(page: Path) -> list[list[str]]:
    """The words of each `coral-hf …` in a page's shell blocks, but for those that end in dots."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [
        line.replace("|", " ; ")
        for line in lines
        if re.match(r"(.*&& |([A-Z_]+=\S+ )*)coral-hf ", line)
    ]
    split = [shlex.split(line, comments=True) for line in lines]
    found = [words[words.index("coral-hf") + 1 :] for words in split]
    whole = [words for words in found if "..." not in words]
    return [words[: words.index(";")] if ";" in words else words for words in whole]


SHOWN = [(page.name, words) for page in PAGES for words in commands(page)]


def test_the_pages_show_every_command():
    assert {words[0] for _, words in SHOWN} == set(COMMANDS)


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=lambda value: str(value)[:60])
def test_a_command_that_is_shown_is_one_that_runs(page, words, tmp_path):
    name, *words = words
    arguments = parse(name, COMMANDS[name], words)
    parse_arguments(tmp_path, arguments.get("training_options", []), use_cpu=True)
