"""The commands, as a user types them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import invoke, printed
from test_examples import folder  # noqa: F401  a saved target and its conversations
from transformers import AutoModel

from coral_hf.cli import COMMANDS, GROUPS, name_of
from coral_hf.cli.parser import parse

ROOT = Path(__file__).parents[1]
TINY_TRAINING = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "True"]


@pytest.fixture(scope="module")
def drafter(trained_folder, tmp_path_factory):
    """A copy of the drafter, which a module may change."""
    copy = tmp_path_factory.mktemp("drafter") / "trained"
    return shutil.copytree(trained_folder / "trained", copy)


def test_train_saves_a_drafter_with_a_trained_router_and_its_tokenizer(drafter):
    loaded = AutoModel.from_pretrained(drafter)
    assert loaded.config.is_router_trained
    figures = loaded.training_record[-1]["heads"]["figures"]
    assert [*figures] == ["full", "routed"]
    fastest = max(figures, key=lambda name: figures[name]["speedup"])
    assert loaded.config.draft_head == fastest
    assert (drafter / "tokenizer.json").exists()


def test_generate_streams_the_text_and_says_how_it_went(drafter, folder):  # noqa: F811
    names = ["--target", folder / "target", "--drafter", drafter]
    result = invoke("generate", *names, "--max-new-tokens", 6, "--tree-depth", 2, "Hello")
    assert result.exit_code == 0, result.output
    assert "6 tokens, " in result.output and " tokens/s, τ " in result.output
    assert any(way in result.output for way in ("trees", "chains", "stepped back"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([" "], "The prompt is empty"),
        (["Hello", "--max-new-tokens", 10**6], "has room for 0: shorten it, or ask for fewer"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(drafter, folder, words, said):  # noqa: F811
    names = ["--target", folder / "target", "--drafter", drafter]
    refused = invoke("generate", *names, *words)
    assert refused.exit_code == 1 and said in printed(refused)


def test_benchmark_writes_its_report(drafter, folder):  # noqa: F811
    names = ["--target", folder / "target", "--drafter", drafter]
    result = invoke(
        "benchmark",
        *names,
        *("--prompts", folder / "talk.jsonl", "--limit", 2, "--max-new-tokens", 6),
        *("--output", folder / "report", "--pad-layers", 3),
        *("--method", "plain", "--method", "coral", "--method", "prompt_lookup"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["settings"]["methods"] == ["plain", "coral", "prompt_lookup"]
    assert (folder / "report" / "acceptance.png").stat().st_size > 0


def test_autotune_keeps_the_tree_beside_the_drafter(drafter, folder, tmp_path):  # noqa: F811
    names = ["--target", folder / "target", "--drafter", drafter, "--limit", 1]
    result = invoke(
        "autotune",
        *names,
        "--prompts",
        folder / "talk.jsonl",
        "--max-seconds",
        0,
        "--output",
        tmp_path,
    )
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "generation_config.json").read_text())
    assert f"tree_depth={kept['tree_depth']}" in result.output
    assert kept["draft_costs"].keys() == {"base", "level", "node"}


def test_help_names_every_command_in_its_group():
    result = invoke("--help")
    assert result.exit_code == 0
    assert list(GROUPS) == ["try", "train", "use", "measure", "publish"]
    for group, commands in GROUPS.items():
        listed = result.output.split(f"\n{group}:\n")[1].split("\n\n")[0]
        assert [line.split()[0] for line in listed.splitlines()] == [name_of(c) for c in commands]


def test_a_wrong_training_option_is_refused_by_name(folder):  # noqa: F811
    arguments = ["train", "--target", folder / "target", "--dataset", folder / "talk.jsonl"]
    arguments += ["--output", folder / "wrong"]
    unknown = invoke(*arguments, "--no_such_option", "1")
    assert unknown.exit_code == 2
    assert "unrecognized arguments: --no-such-option" in unknown.output
    short = invoke(*arguments, "--recip", "hass")  # which would train the default
    assert short.exit_code == 2 and "unrecognized arguments: --recip" in short.output
    wrong = invoke(*arguments, "--num_steps", "0")
    assert wrong.exit_code == 1 and "Error: `num_steps` is 0" in printed(wrong)
    shown = invoke("--traceback", *arguments, "--num_steps", "0")
    assert isinstance(shown.exception, ValueError)


def test_a_training_option_with_a_wrong_value_is_named_in_two_lines(folder):  # noqa: F811
    names = ["--target", "absent", "--dataset", folder / "talk.jsonl", "--output", folder / "wrong"]
    result = invoke("train", *names, "--learning-rate", "fast")
    assert result.exit_code == 2 and len(result.output.splitlines()) == 2
    assert "learning_rate/--learning-rate: invalid float value: 'fast'" in result.output


def test_an_option_has_one_spelling_and_that_of_transformers_is_read_too():
    words = ["--output", "out", "--hold-out", "3", "--max_length", "7", "--check"]
    for spelled in (words, [word.replace("max_l", "max-l") for word in words]):
        own = parse("features", COMMANDS["features"], spelled)["own"]
        assert (own.max_length, own.hold_out, own.output) == (7, 3, Path("out"))


def test_usage_names_what_is_required():
    usage = invoke("export", "--help").output.split("\n\n")[0]
    required = "--target TARGET DRAFTER --to TO --output OUTPUT"
    assert usage == f"usage: coral-hf export {required} [options]"


def test_options_of_the_trainer_are_passed_on_and_those_of_other_commands_refused():
    names = ["--target", "t", "--dataset", "d", "--output", "o"]
    arguments = parse("train", COMMANDS["train"], [*names, "--learning_rate", "1e-3", "--bf16"])
    assert arguments["training_options"] == ["--learning-rate", "1e-3", "--bf16"]
    assert arguments["own"].output == Path("o")
    refused = invoke("regenerate", *names, "--learning-rate", "1e-3")
    assert refused.exit_code == 2 and "unrecognized arguments: --learning-rate" in refused.output


EACH_HELP = """
from coral_hf.cli import COMMANDS, main
for words in ([], *([name] for name in COMMANDS)):
    try:
        main([*words, "--help"])
    except SystemExit as left:
        assert not left.code, words
"""


def test_help_imports_neither_torch_nor_transformers(tmp_path):
    script = tmp_path / "coral-hf"  # as pip writes it
    script.write_text("from coral_hf.cli import main\nmain()\n")
    (tmp_path / "each").mkdir()
    each = tmp_path / "each" / "coral-hf"
    each.write_text(EACH_HELP)
    programs = [([script, "--help"], 1), (["-m", "coral_hf.cli", "--help"], 1)]
    for words, count in [*programs, ([each], 1 + len(COMMANDS))]:
        command = [sys.executable, "-X", "importtime", *words]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert found.returncode == 0 and found.stdout.startswith("usage: coral-hf")
        assert found.stdout.count("usage: coral-hf") == count
        imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
        assert "coral_hf.cli.parser" in imported
        assert not {"torch", "transformers", "numpy", "huggingface_hub"} & imported


def test_a_reader_that_leaves_is_no_error(tmp_path):
    command = f"{sys.executable} -m coral_hf.cli --help | head -c 1"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert (found.stdout, found.stderr) == ("u", "")
