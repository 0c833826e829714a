"""Commands of the docs are ones that the program takes, their code runs, links lead somewhere."""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from test_demo import TINY
from test_examples import folder  # noqa: F401  a saved target and its conversations
from transformers import AutoModelForCausalLM

import coral_hf
from coral_hf import CoralDrafter
from coral_hf.cli import COMMANDS, main
from coral_hf.cli.parser import make_parser, parse
from coral_hf.demo import DemoSettings
from coral_hf.demo.run import run_demo
from coral_hf.training import (
    AssistantTrainingArguments,
    CoralTrainingArguments,
    parse_arguments,
)
from coral_hf.training.arguments import RECIPES
from coral_hf.training.data import load_conversations

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# options of pip, accelerate, vLLM and SGLang, and of newer versions of transformers
OF_OTHERS = """
    --no-deps --only-binary --extra-index-url --config-file --num-processes --mixed-precision
    --max-model-len --model --speculative-config --hf-overrides --model-path
    --speculative-algorithm --speculative-draft-model-path --speculative-token-map
    --activation-checkpointing
""".split()
START, USE = DOCS / "start", sorted((DOCS / "use").glob("*.md"))
# pages about an account, models that think or are large; the playground's command names no model
OF_OTHER_MODELS = {"hub", "reasoning", "llama31_8b_24gb", "qwen3_8b_24gb", "playground"}


def shell_lines(page: Path) -> list[str]:
    """The lines of a page's shell blocks."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line.strip() for line in "".join(blocks).replace("\\\n", " ").splitlines()]


def commands(page: Path) -> list[list[str]]:
    """The words of each `coral-hf` command in a page's shell blocks; not of those with dots."""
    lines = [
        line.replace("|", " ; ")
        for line in shell_lines(page)
        if re.match(r"(.*&& |([A-Z_]+=\S+ )*)coral-hf ", line)
    ]
    split = [shlex.split(line, comments=True) for line in lines]
    found = [words[words.index("coral-hf") + 1 :] for words in split]
    whole = [words for words in found if "..." not in words]
    return [words[: words.index(";")] if ";" in words else words for words in whole]


def calls_of_examples(page: Path) -> list[list[str]]:
    """The words of each call of an example, on a page or in an example's docstring.

    Variables of the shell have their value, or 1 where a loop sets them.
    """
    if page.suffix == ".py":
        text = page.read_text().split('"""')[1].replace("\\\\\n", " ").replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines()]
    else:
        lines = shell_lines(page)
    known = dict(re.findall(r'^([A-Z]+)="(.*)"$', "\n".join(lines), re.MULTILINE))
    found = []
    for line in lines:
        line = re.sub(r"\$(\w+)", lambda match: known.get(match[1], "1"), line)
        words = shlex.split(line, comments=True) if "python examples/" in line else []
        if words and not {"...", "…"} & {*words} and "vllm_speed.py" not in line:  # it needs vLLM
            found.append(words[words.index("python") + 1 :])
    return found


def python_blocks(text: str) -> list[str]:
    """The code of a page's Python blocks."""
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


SHOWN = [(page.name, words) for page in PAGES for words in commands(page)]


def test_the_pages_show_every_command():
    assert {words[0] for _, words in SHOWN} == set(COMMANDS)


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=lambda value: str(value)[:60])
def test_a_command_of_a_page_is_parsed_without_error(page, words, tmp_path):
    name, *words = words
    arguments = parse(name, COMMANDS[name], words)
    parse_arguments(tmp_path, arguments.get("training_options", []), use_cpu=True)


CALLS = [
    pytest.param(words, id=f"{page.name}: {words[0]}")
    for page in (*PAGES, *sorted((ROOT / "examples").glob("*.py")))
    for words in calls_of_examples(page)
]


class Parsed(Exception):
    """Raised in place of what an example does after it has read its options."""


@pytest.mark.parametrize("words", CALLS)
def test_a_call_of_an_example_is_parsed_without_error(words, monkeypatch, tmp_path):
    script, *typed = words
    read = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, args=None, namespace=None):
        _, others = read(self, typed, namespace)
        raise Parsed(others)

    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", [script, *typed])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    with pytest.raises(Parsed) as parsed:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    monkeypatch.undo()
    parse_arguments(tmp_path, parsed.value.args[0], use_cpu=True)


def test_an_option_that_a_page_of_use_names_is_one_of_a_program():
    parsers = [make_parser(name, one).format_help() for name, one in COMMANDS.items()]
    examples = [path.read_text() for path in (ROOT / "examples").rglob("*.py")]
    known = {*re.findall(r"--[a-z][\w-]*", " ".join([*parsers, *examples])), *OF_OTHERS}
    for kind in (CoralTrainingArguments, AssistantTrainingArguments):
        known |= {f"--{one.name}" for one in fields(kind)}
    known = {flag.replace("_", "-") for flag in known}
    named = [
        (page.name, flag)
        for page in (PAGES[0], *START.glob("*.md"), *USE)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())
    ]
    assert len(named) > 300
    assert not [pair for pair in named if pair[1].replace("_", "-") not in known]


def test_the_code_of_the_readme_runs(folder, tmp_path):  # noqa: F811
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    CoralDrafter.from_target(target).save_pretrained(tmp_path / "drafter")
    code = PAGES[0].read_text().replace("org/my-llama", str(folder / "target"))
    code = code.replace("org/coral-my-llama", str(tmp_path / "drafter")).replace("=256", "=8")
    code = code.replace('output_dir="coral-my-llama"', f'output_dir="{tmp_path}", max_steps=1')
    code = code.replace("bf16=True", 'bf16=True, use_cpu=True, report_to="none"')
    code = code.replace("trainer.push_to_hub()", "")  # needs an account
    generating, training = python_blocks(code)
    names = {"conversations": load_conversations(folder / "talk.jsonl")}
    exec(generating, names)
    alone = target.generate(**names["inputs"], max_new_tokens=8, do_sample=False)
    assert torch.equal(names["output"], alone)
    exec(training, names)
    assert names["trainer"].state.global_step == 1


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Where a reader is after the demo, of tiny budgets."""
    place = tmp_path_factory.mktemp("walked")
    run_demo(DemoSettings(output=place / "coral-demo", **TINY))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("page", [*START.glob("*.md"), *USE], ids=lambda page: page.stem)
def test_commands_on_the_models_of_the_demo_run_as_they_stand(page, walked, monkeypatch):
    monkeypatch.chdir(walked)
    for words in commands(page):
        if any(word.startswith("coral-demo/") for word in words):
            main(words)
    for code in python_blocks(page.read_text()) if page.parent == START else ():
        exec(code, {})


# ---- the site


@cache
def hooks() -> ModuleType:
    """What the site adds to the pages."""
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def prose(page: Path) -> str:
    """A page with the tables that are made of the code, and without blocks of code."""
    text = hooks().filled(page.read_text())
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """The names by which links reach the headings of a page, on GitHub and on the site."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_a_link_leads_to_a_file_and_a_heading():
    pages = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", prose(page))]
    inside = [(page, link) for page, link in links if not link.startswith("http")]
    broken = []
    for page, link in inside:
        path, _, heading = link.partition("#")
        leads_to = (page.parent / path).resolve() if path else page
        if not leads_to.exists() or (heading and heading not in headings(leads_to)):
            broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert len(inside) > 200 and not broken


def test_a_page_that_code_names_is_there():
    parts = ("coral_hf", "examples", "tests")
    files = [path for part in parts for path in (ROOT / part).rglob("*")]
    texts = [path.read_text() for path in files if path.suffix in (".py", ".yaml", ".md")]
    named = {name for text in texts for name in re.findall(r"\bdocs/[\w/]+\.\w+", text)}
    assert "docs/reference/guard.md" in named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_oldest_environment_has_the_oldest_versions_that_the_package_allows():
    package, run = (ROOT / "pyproject.toml").read_text(), (ROOT / ".ci" / "run").read_text()
    _, oldest = run.split('python3 -m venv "$env/oldest"')
    for name in ("torch", "transformers"):
        allowed = re.search(rf'"{name}>=([\d.]+)"', package)[1]
        assert {*re.findall(rf"\b{name}==(\S+)\.0\b", oldest)} == {allowed}


def test_the_navigation_of_the_site_has_every_page_once():
    settings = yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text())
    pages = re.findall(r"[\w/]+\.md", str(settings["nav"]))
    present = [path.relative_to(DOCS).as_posix() for path in PAGES[1:]]
    assert sorted(pages) == sorted(present), "put new pages into `nav` of docs/site/mkdocs.yml"


@pytest.mark.parametrize("page", USE, ids=lambda page: page.stem)
def test_a_page_of_use_begins_with_a_command_that_runs_and_ends_with_what_goes_wrong(page):
    begin, *_, end = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)
    assert re.match(r"# .+\n\n```bash\ncoral-hf ", begin)
    assert ("coral-demo/" in begin.split("```")[1]) == (page.stem not in OF_OTHER_MODELS)
    assert end.startswith("What goes wrong\n")


def test_the_reference_lists_every_option_and_every_setting():
    page = hooks().filled((DOCS / "reference" / "cli.md").read_text())
    one_command = re.compile(r"^### coral-hf (\S+)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
    parts = dict(one_command.findall(page))
    assert parts.keys() == COMMANDS.keys()
    for name, one in COMMANDS.items():
        flags = re.findall(r"(--[a-z][\w-]+)", make_parser(name, one).format_help())
        assert {*flags} - {"--help"} <= {*re.findall(r"--[a-z][\w-]+", parts[name])}, name
    page = hooks().filled((DOCS / "reference" / "settings.md").read_text())
    assert "| `csra_temperature` | `0.07` | Temperature of CSRA. |" in page
    assert "`adam_beta1`" not in page and all(f"| `{name}` | " in page for name in RECIPES)
    page = hooks().filled((DOCS / "reference" / "api.md").read_text())
    assert all(f"::: coral_hf.{name}\n" in page for name in coral_hf.__all__)


def test_a_page_that_loads_a_file_from_elsewhere_is_found(caplog):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    for tag in ('<a href="https://x.org">', '<link rel="canonical" href="https://x.org">', "<img>"):
        hooks().on_post_page(tag, page)
    assert not caplog.records
    for tag in ('<script src="https://x.org/x.js">', '<link href="//x.org/x.css">'):
        hooks().on_post_page(tag, page)
    assert len(caplog.records) == 2
