"""The commands in README and docs are ones that the program takes, and the README's code runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from test_examples import folder  # noqa: F401  a saved target and its conversations
from transformers import AutoModelForCausalLM

from coral_hf import CoralDrafter
from coral_hf.cli import COMMANDS
from coral_hf.cli.parser import parse
from coral_hf.training import parse_arguments
from coral_hf.training.data import load_conversations

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The words of each `coral-hf` command in a page's shell blocks; not of those with dots."""
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
def test_a_command_of_a_page_is_parsed_without_error(page, words, tmp_path):
    name, *words = words
    arguments = parse(name, COMMANDS[name], words)
    parse_arguments(tmp_path, arguments.get("training_options", []), use_cpu=True)


def test_the_code_of_the_readme_runs(folder, tmp_path):  # noqa: F811
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    CoralDrafter.from_target(target).save_pretrained(tmp_path / "drafter")
    code = PAGES[0].read_text().replace("org/my-llama", str(folder / "target"))
    code = code.replace("org/coral-my-llama", str(tmp_path / "drafter")).replace("=256", "=8")
    code = code.replace('output_dir="coral-my-llama"', f'output_dir="{tmp_path}", max_steps=1')
    code = code.replace("bf16=True", 'bf16=True, use_cpu=True, report_to="none"')
    code = code.replace("trainer.push_to_hub()", "")  # needs an account
    generating, training = re.findall(r"^```python\n(.*?)^```", code, re.MULTILINE | re.DOTALL)
    names = {"conversations": load_conversations(folder / "talk.jsonl")}
    exec(generating, names)
    alone = target.generate(**names["inputs"], max_new_tokens=8, do_sample=False)
    assert torch.equal(names["output"], alone)
    exec(training, names)
    assert names["trainer"].state.global_step == 1
