"""Training runs are compared on the same data, and no run is repeated."""

import json
import shutil

import pytest
import torch
from conftest import printed, tiny_target
from test_cli import invoke
from test_examples import folder  # noqa: F401  a saved target and its conversations
from transformers import AutoModelForCausalLM, AutoTokenizer

from coral_hf import Eagle3Drafter
from coral_hf.atomic import sole_writer
from coral_hf.measure.settings import ComparisonSettings
from coral_hf.training import parse_arguments
from coral_hf.training.comparison import (
    Comparison,
    Result,
    Trial,
    compare,
    comparison_table,
    halve,
)
from coral_hf.training.data import load_conversations


def result(trial: str, seed: int, value: float, steps: int = 10) -> Result:
    return Result(trial, seed, steps, 100, 1.0, {}, {"0.0": {"chat": value, "code": value + 1}})


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("hass", "hass", ["--recipe=hass"]),
        (
            "coral csra_weight=0.5",
            "coral csra_weight=0.5",
            ["--recipe=coral", "--csra_weight=0.5"],
        ),
        ("num_steps=4", "num_steps=4", ["--num_steps=4"]),
        ("hass drafter.fc_bias=true", "hass drafter.fc_bias=true", ["--recipe=hass"]),
    ],
)
def test_a_trial_is_a_recipe_and_settings(text, name, options):
    trial = Trial.parse(text)
    assert (trial.name, trial.options) == (name, options)


def test_a_trial_has_the_drafter_that_its_recipe_is_for():
    trial = Trial.parse("eagle3 csra_weight=0.1 drafter.draft_vocab_size=20")
    drafter = trial.fresh(tiny_target("llama"), parse_arguments("unused", trial.options))
    assert type(drafter) is Eagle3Drafter and drafter.config.draft_vocab_size == 20
    with pytest.raises(ValueError, match="`num_heads` is no field of Eagle3Config"):
        Trial.parse("eagle3 drafter.num_heads=4")


@pytest.mark.parametrize("text", ["", "coral csra_weight", "coral =3"])
def test_invalid_trials_are_refused(text):
    with pytest.raises(ValueError, match="A trial is .*; write it as"):
        Trial.parse(text)


def test_the_table_gives_spread_and_paired_difference():
    rows = [result("eagle", seed, 2.0 + seed) for seed in range(3)]
    rows += [result("coral", seed, 2.2 + seed) for seed in range(3)]
    rows += [result("hass", seed, 2.0 + seed + 0.3 * (-1) ** seed) for seed in range(3)]
    lines = comparison_table(rows).splitlines()
    assert "| eagle | 3.000 ± 1.000 | 4.000 ± 1.000 | 3.500 ± 1.000 |  |" in lines
    assert lines[3].endswith("| 3.700 ± 1.000 | +0.200 (+0.200 to +0.200) |")
    assert lines[4].endswith("| +0.100 (-0.761 to +0.961), no measurable difference |")


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        # three standard errors of three seeds, whose quantile of t is 4.3
        ((0.1, 0.3, 0.2), "+0.200 (-0.048 to +0.448), no measurable difference"),
        ((0.1, 0.3, 0.2, 0.2), "+0.200 (+0.070 to +0.330)"),
        ((0.1,), ""),
    ],
)
def test_few_seeds_have_to_differ_by_more(gaps, said):
    rows = [result("eagle", seed, 2.0) for seed in range(len(gaps))]
    rows += [result("coral", seed, 2.0 + gap) for seed, gap in enumerate(gaps)]
    assert comparison_table(rows).splitlines()[3].endswith(f"| {said} |")


class Prepared:
    """A comparison whose results are known: a trial scores the digit that its name ends with."""

    def __init__(self):
        self.asked: list[tuple[str, int]] = []

    def result(self, trial, seed, steps):
        self.asked.append((trial.name, steps))
        return result(trial.name, seed, float(trial.name[-1]), steps)


def test_halving_keeps_the_better_half_and_trains_it_for_longer():
    comparison = Prepared()
    rungs = halve(comparison, [Trial.parse(f"top_k={k}") for k in (3, 1, 5, 4, 2)], 10, keep=1)
    assert [(rung[0].steps, [r.trial[-1] for r in rung]) for rung in rungs] == [
        (10, ["5", "4", "3", "2", "1"]),
        (20, ["5", "4", "3"]),
        (40, ["5", "4"]),
        (80, ["5"]),
    ]
    assert len(comparison.asked) == 11


OPTIONS = ["--per_device_train_batch_size", "2", "--use_cpu", "True", "--max_length", "64"]


def test_a_comparison_resumes_with_the_trials_that_are_missing(folder):  # noqa: F811
    names = [
        *("--target", folder / "target", "--dataset", folder / "talk.jsonl"),
        *("--prompts", folder / "talk.jsonl", "--limit", 2, "--output", folder / "compared"),
        *("--steps", 2, "--seeds", 2, "--max-new-tokens", 6, "--tree-depth", 2, *OPTIONS),
    ]
    first = invoke("compare", *names, "--trial", "eagle")
    assert first.exit_code == 0, first.output
    results = folder / "compared" / "results.jsonl"
    lines = results.read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["num_tokens"] > 0
    second = invoke("compare", *names, "--trial", "eagle", "--trial", "coral num_steps=2")
    assert second.exit_code == 0, second.output
    assert results.read_text().splitlines()[:2] == lines
    assert len(results.read_text().splitlines()) == 4
    assert "| coral num_steps=2 |" in (folder / "compared" / "table.md").read_text()
    assert torch.tensor(json.loads(lines[0])["acceptance"]["0.0"]["talk"]) >= 1


def test_several_numbers_of_steps_are_compared(folder):  # noqa: F811
    names = [
        *("--target", folder / "target", "--dataset", folder / "talk.jsonl"),
        *("--prompts", folder / "talk.jsonl", "--limit", 1, "--output", folder / "scaled"),
        *("--steps", 1, "--steps", 2, "--seeds", 1, "--max-new-tokens", 4, "--temperature", 0),
        *("--trial", "eagle", "--trial", "eagle drafter.num_hidden_layers=2", *OPTIONS),
    ]
    found = invoke("compare", *names)
    assert found.exit_code == 0, found.output
    lines = [json.loads(x) for x in (folder / "scaled" / "results.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [1, 1, 2, 2]
    assert lines[0]["losses"] != lines[1]["losses"]


@pytest.fixture
def names(folder, tmp_path):  # noqa: F811
    """The options of a comparison of one training run."""
    return [
        *("--target", folder / "target", "--dataset", folder / "talk.jsonl", "--trial", "eagle"),
        *("--prompts", folder / "talk.jsonl", "--limit", 1, "--output", tmp_path / "once"),
        *("--steps", 1, "--seeds", 1, "--max-new-tokens", 4, "--temperature", 0, *OPTIONS),
    ]


def test_results_of_other_settings_are_not_mixed(names, tmp_path):
    assert invoke("compare", *names).exit_code == 0
    with (tmp_path / "once" / "results.jsonl").open("a") as file:
        file.write('{"trial": "ha')  # a kill cut the line off
    again = invoke("compare", *names)
    assert again.exit_code == 0, again.output
    for other, said in (
        (["--learning_rate", "0.5"], "was written with options"),
        (["--tree-depth", 3], "was written with tree_depth"),
        (["--trial", "coral csra_weight=-1"], "`csra_weight` is -1.0"),
        (["--dtype", "bfloat16"], "was written with target"),
    ):
        found = invoke("compare", *names, *other)
        assert found.exit_code != 0 and said in printed(found)
    found = invoke("compare", *names, "--keep", 1)
    assert found.exit_code != 0 and "--keep does not go with --seeds" in found.output


def test_results_of_another_target_at_the_same_path_are_not_mixed(folder, names, tmp_path):  # noqa: F811
    shutil.copytree(folder / "target", tmp_path / "target")
    names[1] = tmp_path / "target"
    assert invoke("compare", *names).exit_code == 0
    target = AutoModelForCausalLM.from_pretrained(names[1])
    target.lm_head.weight.data[-1] += 1
    target.save_pretrained(names[1])
    found = invoke("compare", *names)
    assert found.exit_code == 1 and "was written with target" in printed(found)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--trial", "coral drafter.num_layerz=2"], "`num_layerz` is no field of CoralConfig"),
        (["--trial", "coral drafter.fc_bias=True"], "'fc_bias=True' does not fit CoralConfig"),
        (["--trial", "coral drafter.num_hidden_layers=1.5"], "'num_hidden_layers=1.5' does"),
        (["--trial", "coral csra_wait=1"], "csra_wait"),
        (["--max_length", "-100"], "`max_length` is -100; use a whole number, 3 or more"),
        (["--steps", 0], "`steps` is [1, 0]; use 1 or more"),
        (["--max-new-tokens", 1], "`max_new_tokens` is 1; use 2 or more"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused_before_a_folder_is_made(
    names, tmp_path, wrong, said
):
    found = invoke("compare", *names, *wrong)
    assert found.exit_code in (1, 2) and said in printed(found)
    assert not (tmp_path / "once").exists()


def test_a_second_comparison_in_a_folder_is_refused(names, tmp_path):
    (tmp_path / "once").mkdir()
    with sole_writer(tmp_path / "once"):
        found = invoke("compare", *names)
        assert found.exit_code == 1 and "once is in use: another run" in printed(found)
    assert invoke("compare", *names).exit_code == 0


def test_steps_below_one_are_refused(folder, tmp_path):  # noqa: F811
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    rows = load_conversations(folder / "talk.jsonl")
    settings = ComparisonSettings(output=tmp_path / "none", options=OPTIONS)
    comparison = Comparison(target, tokenizer, rows, [], settings)
    with pytest.raises(ValueError, match="`steps` is 0; use 1 or more"):
        compare(comparison, [Trial.parse("eagle")], [4, 0], seeds=1)
    assert not (tmp_path / "none").exists()
