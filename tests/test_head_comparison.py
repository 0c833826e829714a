"""Draft heads of one drafter are made once and measured in turn."""

import json
import runpy
from operator import itemgetter

import pytest
import torch
from test_examples import (  # noqa: F401  a saved target and its conversations
    EXAMPLES,
    folder,
    run,
)

from coral_hf import CoralDrafter, Eagle3Drafter

SCRIPT = "compare_heads.py"
HeadTrial, read_share = itemgetter("HeadTrial", "read_share")(
    runpy.run_path(str(EXAMPLES / SCRIPT))
)
ROUTED = "routed grouping=contiguous num_groups=8 num_active_groups=2"


def test_the_key_of_a_trial_is_how_its_head_is_made_not_how_it_is_read():
    trial = HeadTrial.parse(f"{ROUTED} routing=per_node active_mass=0.9")
    assert trial.head == "routed" and trial.key == "routed-contiguous-8"
    assert trial.fields == {
        "grouping": "contiguous",
        "num_groups": 8,
        "num_active_groups": 2,
        "routing": "per_node",
        "active_mass": 0.9,
    }
    assert HeadTrial.parse("full").key == "full"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "A trial is ''; write a head"),
        ("hot num_hot_tokens=4", "A trial is 'hot .*write a head"),
        ("routed grouping=kmeans", "write a head with .*'grouping', 'num_groups'"),
        ("routed grouping=kmeans num_groups=8 rank=3", "`rank` is no field of CoralConfig"),
        ("full num_groups=3", "A trial is 'full num_groups=3'; write a head"),
        ("frequency num_hot_tokens", "'num_hot_tokens' does not fit CoralConfig"),
        ("frequency num_hot_tokens=many", "'num_hot_tokens=many' does not fit"),
    ],
)
def test_invalid_trials_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        HeadTrial.parse(text)


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({"draft_head": "full"}, 1.0),
        ({"draft_head": "frequency", "num_hot_tokens": 100}, 0.1),
        # a draft vocabulary of its own
        ({"draft_head": "full", "draft_vocab_size": 250}, 0.25),
        # 2 of 8 groups of 125, the router's 20 × 20 and 8 × 20
        ({"draft_head": "routed", "num_groups": 8, "num_active_groups": 2}, 0.278),
        # one byte of four, and a scale of four bytes for 20 channels
        ({"draft_head": "quantized"}, 0.3),
    ],
)
def test_the_share_read_includes_the_weights_that_a_head_adds(fields, share):
    assert read_share({"vocab_size": 1000, "hidden_size": 20, **fields}, 4) == pytest.approx(share)


@pytest.mark.slow
def test_heads_are_made_once_and_measured(folder, monkeypatch):  # noqa: F811
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    CoralDrafter.from_target(target).save_pretrained(folder / "drafter")
    trials = [
        ROUTED,
        f"{ROUTED} routing=per_node",
        "routed grouping=contiguous num_groups=4 num_active_groups=1",
        "frequency num_hot_tokens=20",
        "quantized",
    ]
    out = folder / "heads"
    names = [
        *("--target", folder / "target", "--drafter", folder / "drafter"),
        *("--dataset", folder / "talk.jsonl", "--prompts", folder / "talk.jsonl"),
        *("--limit", 2, "--output", out, "--max-new-tokens", 8),
        *(part for trial in trials for part in ("--trial", trial)),
        *("--max_steps", 2, "--per_device_train_batch_size", 2, "--use_cpu", True),
        *("--max_length", 64),
    ]
    run(monkeypatch, SCRIPT, *names)
    made = {path.name for path in (out / "heads").iterdir()}
    assert made == {
        *("full", "routed-contiguous-8", "routed-contiguous-4"),
        *("frequency-20", "quantized"),
    }
    report = json.loads((out / "report.json").read_text())
    assert [*report["trials"]] == ["full", *trials]
    calls = {(call["method"], call["temperature"]): call for call in report["calls"]}
    assert {*calls} == {(name, t) for name in ("plain", "full", *trials) for t in (0.0, 1.0)}
    greedy = [call for call in report["calls"] if call["temperature"] == 0.0]
    assert len(greedy) == 14 and all(call["num_equal_rows"] == 1 for call in greedy)
    table = (out / "report.md").read_text()
    assert "| frequency num_hot_tokens=20 |" in table and "## T = 1" in table
    assert (out / "sweep-contiguous-shared-0.png").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in (out / "heads").rglob("*.safetensors")}
    run(monkeypatch, SCRIPT, *names)
    after = {path: path.stat().st_mtime_ns for path in (out / "heads").rglob("*.safetensors")}
    assert before == after
    other = CoralDrafter.from_target(target)
    torch.nn.init.zeros_(other.fc.weight)
    other.save_pretrained(folder / "drafter")
    with pytest.raises(ValueError, match="was written with drafter"):
        run(monkeypatch, SCRIPT, *names)
    config = json.loads((out / "heads" / "routed-contiguous-8" / "config.json").read_text())
    assert config["is_router_trained"] and config["num_groups"] == 8


@pytest.mark.slow
def test_a_head_of_an_eagle3_drafter_is_measured_beside_another_drafter(folder, monkeypatch):  # noqa: F811
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    for name, fields in (("whole", {}), ("reduced", {"draft_vocab_size": 20})):
        Eagle3Drafter.from_target(target, **fields).save_pretrained(folder / name)
    names = [
        *("--target", folder / "target", "--dataset", folder / "talk.jsonl"),
        *("--drafter", folder / "whole", "--beside", folder / "reduced", "--recipe", "eagle3"),
        *("--prompts", folder / "talk.jsonl", "--limit", 2, "--max-new-tokens", 8),
        *("--trial", ROUTED, "--output", folder / "eagle3", "--max_steps", 2),
        *("--per_device_train_batch_size", 2, "--use_cpu", True, "--max_length", 64),
    ]
    run(monkeypatch, SCRIPT, *names)
    report = json.loads((folder / "eagle3" / "report.json").read_text())
    assert [*report["trials"]] == ["full", ROUTED, "reduced"]
    assert {call["num_equal_rows"] for call in report["calls"] if call["temperature"] == 0} == {1}
