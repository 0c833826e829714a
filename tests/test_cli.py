"""The commands, as a user types them."""

import json

import pytest
from conftest import printed
from test_examples import folder  # noqa: F401  a saved target and its conversations
from transformers import AutoModel
from typer.testing import CliRunner

from coral_hf.cli import app

TINY_TRAINING = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "True"]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def drafter(folder):  # noqa: F811
    result = invoke(
        "train",
        *("--target", folder / "target", "--dataset", folder / "talk.jsonl"),
        *("--output", folder / "trained", "--router-epochs", 1, *TINY_TRAINING),
    )
    assert result.exit_code == 0, result.output
    return folder / "trained"


def test_train_saves_a_drafter_with_a_trained_router_and_its_tokenizer(drafter):
    loaded = AutoModel.from_pretrained(drafter)
    assert loaded.config.draft_head == "routed"
    assert (drafter / "tokenizer.json").exists()


def test_generate_streams_the_text_and_says_how_it_went(drafter, folder):  # noqa: F811
    names = ["--target", folder / "target", "--drafter", drafter]
    result = invoke("generate", *names, "--max-new-tokens", 6, "--tree-depth", 2, "Hello")
    assert result.exit_code == 0, result.output
    assert "tokens per target pass" in result.output


def test_benchmark_writes_its_report(drafter, folder):  # noqa: F811
    names = ["--target", folder / "target", "--drafter", drafter]
    result = invoke(
        "benchmark",
        *names,
        *("--prompts", folder / "talk.jsonl", "--limit", 2, "--max-new-tokens", 6),
        *("--output", folder / "report", "--pad-layers", 3, "--method", "plain"),
        *("--method", "coral", "--method", "bigram", "--bigram-dataset", folder / "talk.jsonl"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["settings"]["methods"] == ["plain", "coral", "bigram"]
    assert (folder / "report" / "acceptance.png").stat().st_size > 0


def test_help_names_every_command():
    result = invoke("--help")
    assert all(
        name in result.output
        for name in ("train", "generate", "demo", "benchmark", "sweep", "time-heads")
    )


def test_an_unknown_training_option_is_an_error(folder):  # noqa: F811
    arguments = ["--target", folder / "target", "--dataset", folder / "talk.jsonl"]
    arguments += ["--output", folder / "wrong", "--no_such_option", "1"]
    result = invoke("train", *arguments)
    assert result.exit_code == 1
    assert "Error: " in printed(result) and "no_such_option" in printed(result)
    shown = invoke("--traceback", "train", *arguments)
    assert isinstance(shown.exception, ValueError)
