"""A paper's table from one recipe file: what is trained and measured, and what was not run."""

import json
from dataclasses import fields

import pytest
import yaml
from conftest import invoke
from test_examples import folder  # noqa: F401  a saved target and its conversations

from coral_hf import CoralDrafter
from coral_hf.cli.reproduce import SHIPPED, cell, table
from coral_hf.cli.train import TrainOptions
from coral_hf.measure import BenchmarkSettings
from coral_hf.training import parse_arguments

RECIPE = yaml.safe_load((SHIPPED / "coral.yaml").read_text())


def test_every_value_of_the_shipped_recipe_is_one_that_a_command_takes(tmp_path):
    own = {one.name for one in fields(TrainOptions)}
    for drafter in RECIPE["drafters"].values():
        given = {**RECIPE["train"], **drafter, "use_cpu": True}
        words = [f"--{name}={value}" for name, value in given.items() if name not in own]
        parse_arguments(tmp_path, words)
    for method in RECIPE["methods"].values():
        assert method["drafter"] in RECIPE["drafters"]
        head = {"draft_head": method["draft_head"]}
        for temperature in RECIPE["temperatures"]:
            BenchmarkSettings(**RECIPE["measure"], **head, temperature=temperature)
    assert list(RECIPE["benchmarks"]) == ["MT-bench", "HumanEval", "GSM8K", "Spec-Bench"]
    assert RECIPE["temperatures"] == [0, 1]


def write_report(output, method, name, temperature, speedup, tau):
    row = {"task": "overall", "method": "coral", "num_items": 80, "num_tokens": 900}
    plain = {**row, "method": "plain", "speedup": 1.0, "tau_per_token": 1.0}
    own = {**row, "speedup": speedup, "tau_per_token": tau}
    file = cell(output, method, name, temperature)
    file.parent.mkdir(parents=True)
    environment = {"hardware": "an accelerator"}
    rows = [{**own, "task": "mt", "speedup": 9.0}, plain, own]
    file.write_text(json.dumps({"rows": rows, "environment": environment}))


def test_a_cell_shows_its_report_and_a_mean_needs_all_of_its_line(tmp_path):
    for index, name in enumerate(RECIPE["benchmarks"]):
        write_report(tmp_path, "HASS", name, 0, 2.0 + index, 4.0 + index)
    write_report(tmp_path, "CORAL", "GSM8K", 1, 2.512, 3.987)
    text = table(tmp_path, RECIPE)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    head = next(line for line in cells if line[:1] == ["T"])
    names = ["MT-bench", "HumanEval", "GSM8K", "Spec-Bench", "mean"]
    assert head == ["T", "method", *sum(([name, "τ"] for name in names), [])]
    lines = {tuple(line[:2]): line[2:] for line in cells if len(line) == len(head)}
    assert lines["0", "HASS"][:4] == ["2.00x", "4.00", "3.00x", "5.00"]
    assert lines["0", "HASS"][-2:] == ["3.50x", "5.50"]
    missing = ["not run"] * 4
    assert lines["1", "CORAL"] == [*missing, "2.51x", "3.99", *missing]
    assert set(lines["1", "EAGLE-2"]) == {"not run"} and len(lines) == 2 + 8
    assert "GSM8K: 80 answers, 900 tokens; " in text
    assert "; on an accelerator, bfloat16.\n" in text


@pytest.mark.slow
def test_a_paper_is_reproduced_at_a_tiny_scale_and_goes_on_where_it_stopped(folder, tmp_path):  # noqa: F811
    recipe = json.loads(json.dumps(RECIPE))
    recipe |= {"target": str(folder / "target"), "dtype": "float32", "limit": 1}
    recipe["data"] = {"dataset": [str(folder / "talk.jsonl")]}
    recipe["measure"] |= {"max_new_tokens": 6, "tree_depth": 2, "tree_top_k": 2, "tree_nodes": 5}
    recipe["measure"]["warmup"] = 0
    recipe["drafters"]["coral"] |= {"num_groups": 8, "num_active_groups": 2}
    recipe["methods"] = {name: recipe["methods"][name] for name in ("HASS", "CORAL")}
    del recipe["drafters"]["eagle"]
    recipe["train"] |= {"bf16": False, "max_length": 40}
    questions = tmp_path / "q.jsonl"
    questions.write_text(
        json.dumps({"turns": ["Hi.", "And?"]}) + "\n" + json.dumps({"turns": ["A"]})
    )
    recipe["benchmarks"] = {"MT-bench": str(questions)}
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe))
    output = tmp_path / "out"
    words = [tmp_path / "tiny.yaml", "--output", output, "--use_cpu", "True", "--max_steps", "2"]
    first = invoke("reproduce", *words)
    assert first.exit_code == 0, first.output
    names = [f"{method}, MT-bench, T={t}" for method in ("CORAL", "HASS") for t in (0, 1)]
    assert sorted(path.name for path in (output / "results").iterdir()) == names
    assert CoralDrafter.from_pretrained(output / "coral").heads.router is not None
    assert CoralDrafter.from_pretrained(output / "hass").heads.router is None
    report, one = cell(output, "CORAL", "MT-bench", 1), cell(output, "HASS", "MT-bench", 0)
    weights = output / "coral" / "model.safetensors"
    before, kept = report.read_text(), weights.stat().st_mtime_ns
    assert json.loads(before)["settings"]["draft_head"] == "routed"
    one.unlink()
    assert invoke("reproduce", *words).exit_code == 0
    assert one.is_file() and report.read_text() == before and weights.stat().st_mtime_ns == kept
    text = (output / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("| 0 |", "| 1 |"))]
    assert len(lines) == 4 and all(line.count("x |") == 2 for line in lines)
    again = invoke("reproduce", *words, "--seed", "7")
    assert again.exit_code == 1 and "was written with options" in again.output
