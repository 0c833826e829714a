"""A paper's table from one recipe file: what is trained and measured, and what was not run."""

import json
from dataclasses import fields

import pytest
import yaml
from conftest import invoke
from datasets import Dataset, DatasetDict
from test_examples import folder  # noqa: F401  a saved target and its conversations

from coral_hf import CoralDrafter
from coral_hf.cli.reproduce import SHIPPED, ReproduceOptions, cell, table, values
from coral_hf.cli.train import TrainOptions
from coral_hf.measure import BenchmarkSettings
from coral_hf.training import parse_arguments

READ = yaml.safe_load((SHIPPED / "coral.yaml").read_text())
RECIPE = values(READ)


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
    text = table(tmp_path, READ)
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
    assert "; on an accelerator, bfloat16.\n\n## What" in text
    for part in (
        "csra_temperature | 0.07 | usual",
        "num_steps | 3 | as HASS",
        "target | meta-llama",
    ):
        assert part in text.replace("--:", ""), part


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": "medusa"}, r"`recipe` is 'medusa'; use a YAML file, or of \['coral'\]"),
        ({"method": ["CORAl"]}, "`method` is CORAl; use one of .*'CORAL'"),
        ({"benchmark": ["Alpaca"]}, "`benchmark` is Alpaca; use one of .*'GSM8K'"),
        ({"prompts": ["q.jsonl"]}, "`prompts` is 'q.jsonl'; give a benchmark too: HumanEval=q.jso"),
    ],
)
def test_what_a_recipe_lacks_is_refused(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        ReproduceOptions(**{"recipe": "coral", "output": tmp_path, **given}).read()


@pytest.mark.slow
def test_a_paper_is_reproduced_at_a_tiny_scale_and_goes_on_where_it_stopped(folder, tmp_path):  # noqa: F811
    recipe = json.loads(json.dumps(READ))
    recipe["measure"] |= {"max_new_tokens": 6, "tree_depth": 2, "tree_top_k": 2, "tree_nodes": 5}
    recipe["measure"]["warmup"] = 0
    recipe["drafters"]["coral"] |= {"num_groups": 8, "num_active_groups": 2}
    del recipe["methods"]["EAGLE-2"]
    recipe["train"] |= {"bf16": False, "max_length": 40}
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe))
    questions = tmp_path / "q.jsonl"
    questions.write_text(
        json.dumps({"turns": ["Hi.", "And?"]}) + "\n" + json.dumps({"turns": ["A"]})
    )
    saved = Dataset.from_list([{"task_id": "a", "prompt": "def f():"}] * 2)
    DatasetDict({"test": saved}).save_to_disk(tmp_path / "saved")
    output = tmp_path / "out"
    words = [tmp_path / "tiny.yaml", "--output", output, "--target", folder / "target"]
    words += ["--dtype", "float32", "--dataset", folder / "talk.jsonl", "--limit", 1]
    words += ["--prompts", f"MT-bench={questions}", "--prompts", f"HumanEval={tmp_path / 'saved'}"]
    words += ["--use_cpu", "True", "--max_steps", "2"]
    part = ["--benchmark", "MT-bench", "--benchmark", "HumanEval"]
    first = invoke("reproduce", *words, "--method", "CORAL", "--benchmark", "MT-bench")
    assert first.exit_code == 0, first.output
    assert sorted(path.name for path in (output / "results").iterdir()) == [
        "CORAL, MT-bench, T=0",
        "CORAL, MT-bench, T=1",
    ]
    assert "not run" in first.output and not (output / "hass").exists()
    assert CoralDrafter.from_pretrained(output / "coral").heads.router is not None
    kept = (output / "coral" / "model.safetensors").stat().st_mtime_ns
    report = cell(output, "CORAL", "MT-bench", 1)
    before = report.read_text()
    assert json.loads(before)["settings"]["draft_head"] == "routed"
    assert invoke("reproduce", *words, *part).exit_code == 0
    assert report.read_text() == before
    assert (output / "coral" / "model.safetensors").stat().st_mtime_ns == kept
    text = (output / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("| 0 |", "| 1 |"))]
    assert len(lines) == 6
    for line in lines:  # two benchmarks, two that were not run, and so no mean
        assert line.count("x |") == 2 and line.count("not run") == 6
    assert CoralDrafter.from_pretrained(output / "hass").heads.router is None
    again = invoke("reproduce", *words, "--seed", "7")
    assert again.exit_code == 1 and "was written with options" in again.output
