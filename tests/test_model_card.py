"""The model card says what the checkpoint and its reports hold, and nothing else."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_target
from datasets import Dataset
from huggingface_hub import ModelCard
from test_examples import folder  # noqa: F401  a saved target with its tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from coral_hf import CoralDrafter, Eagle3Drafter
from coral_hf.hub import CardFacts, make_card, read_results, write_card
from coral_hf.hub.card import check_results
from coral_hf.hub.repository import hub_id
from coral_hf.identity import weights_digest
from coral_hf.measure import BenchmarkSettings, Prompt, Report, run_benchmark
from coral_hf.measure.report import command_line
from coral_hf.training.runs.run_record import hub_datasets


@pytest.fixture(scope="module")
def drafter(folder):  # noqa: F811
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    return CoralDrafter.from_target(target, target_name_or_path="org/target").eval()


@pytest.fixture(scope="module")
def report(folder, drafter) -> Report:  # noqa: F811
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    prompts = [Prompt("story", "a", text="Once upon"), Prompt("code", "b", text="def f():")]
    settings = BenchmarkSettings(max_new_tokens=8, tree_depth=2, tree_nodes=4)
    return run_benchmark(target, drafter, tokenizer, prompts, settings)


@pytest.fixture
def report_file(report, tmp_path) -> Path:
    report.write(tmp_path / "report")
    return tmp_path / "report" / "report.json"


def changed(path: Path, change) -> Path:
    """A report of which something is different."""
    found = json.loads(path.read_text())
    change(found)
    path.with_name("changed.json").write_text(json.dumps(found))
    return path.with_name("changed.json")


def test_a_card_shows_a_reports_own_numbers_by_benchmark_and_by_depth(drafter, report, report_file):
    depths = [{"method": "coral", "depth": 1, "share": 0.61, "share_given_parent": 0.61}]
    depths += [{"method": "coral", "depth": 2, "share": 0.305, "share_given_parent": 0.5}]
    depths += [{"method": "bigram", "depth": 1, "share": 0.1234, "share_given_parent": 0.1234}]
    measured = changed(report_file, lambda found: found.update(acceptance=depths))
    card = make_card(drafter, CardFacts("org/x"), [read_results(measured)]).content
    rows = [row for row in report.numbers["rows"] if row.method == "coral"]
    assert [row.task for row in rows] == ["story", "code", "overall"]
    for row in rows:
        assert (
            f"| {row.task} | {row.num_items} | {row.tau_per_token:.2f} | {row.speedup:.2f}x |"
            in card
        )
    assert "| 1 | 61.0% | 61.0% |\n| 2 | 30.5% | 50.0% |" in card
    assert "12.3%" not in card  # of another method
    environment = report.environment
    assert f"### {environment.hardware}, float32, greedy" in card
    for version in environment.versions.values():
        assert version in card
    assert f"{environment.num_cores} cores" in card
    program, *options = environment.command.split(" ")
    assert f"`{' '.join([Path(program).name, *options])}`" in card
    never = changed(report_file, lambda found: found.update(acceptance=[]))
    found = make_card(drafter, CardFacts("org/x"), [read_results(never)]).content
    assert "No guess was accepted" in found
    assert "Not measured" not in card and "Speed was measured" in card


def test_unknown_facts_are_called_unknown():
    drafter = CoralDrafter.from_target(tiny_target("llama"))
    card = make_card(drafter, CardFacts("fresh"))
    assert card.data.to_dict() == {
        "library_name": "coral_hf",
        "pipeline_tag": "text-generation",
        "tags": ["coral", "speculative-decoding", "drafter"],
    }
    for line in (
        "| target | not recorded |",
        "| its revision | not recorded |",
        "Not recorded: the checkpoint does not say how it was trained",
        "Not measured.",
        "rows of a length not recorded",
        "Speed has not been measured",
    ):
        assert line in card.content


def test_a_local_folder_is_not_a_hub_id(tmp_path):
    assert hub_id(str(tmp_path)) is None and hub_id("a/b/c") is None and hub_id(None) is None
    assert hub_id("org/llama") == "org/llama"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: found["rows"].clear(), "measured no drafter"),
        (
            lambda found: found.pop("acceptance"),
            "cannot be read as a report of `coral-hf benchmark`",
        ),
    ],
)
def test_a_report_without_a_drafter_is_refused(report_file, change, reason):
    with pytest.raises(ValueError, match=reason):
        read_results(changed(report_file, change))


def test_a_report_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "report.json").write_text("{")
    for name in ("report.json", "absent.json"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_results(tmp_path / name)


def test_a_report_of_another_drafter_or_target_is_refused(drafter, report_file):
    results = read_results(report_file)
    check_results(results, drafter, ["org/target", None])
    with pytest.raises(ValueError, match="measured on the target target, the drafter is for llama"):
        check_results(results, drafter, ["org/llama"])
    other = deepcopy(drafter)
    with torch.no_grad():
        other.fc.weight[0, 0] *= 1.01  # one number of all
    with pytest.raises(ValueError, match="measured other weights"):
        check_results(results, other, ["org/target"])


def test_a_report_in_another_dtype_than_the_checkpoints_is_of_the_same_drafter(drafter):
    wide = deepcopy(drafter).float()
    assert weights_digest(deepcopy(wide).bfloat16()) == weights_digest(wide)


def test_a_report_that_was_measured_in_float16_is_of_the_same_drafter(drafter, report_file):
    half = changed(
        report_file,
        lambda found: found["environment"].update(
            drafter_digest=weights_digest(deepcopy(drafter).half())
        ),
    )
    check_results(read_results(half), drafter, ["org/target"])


def test_paths_are_cut_down_to_their_last_part(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    typed = ["/usr/bin/coral-hf", "--target=/home/me/target", "../me/x.jsonl", "data/x.jsonl"]
    monkeypatch.setattr("sys.argv", [*typed, "org/drafter", "--limit=3", "-1"])
    assert command_line() == "coral-hf --target=target x.jsonl x.jsonl org/drafter --limit=3 -1"


def test_a_rewritten_card_keeps_its_license_but_not_its_results(drafter, report_file, tmp_path):
    facts = CardFacts("org/x", license="mit", tags=["tiny"], datasets=["org/talk"])
    assert write_card(tmp_path, drafter, facts, [read_results(report_file)])
    assert write_card(tmp_path, drafter, CardFacts("org/x"))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.datasets) == ("mit", ["org/talk"])
    assert card.data.tags[-1] == "tiny" and len(set(card.data.tags)) == 4
    assert "Not measured" in card.content
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMine.")
    assert not write_card(tmp_path, drafter, facts)
    assert (tmp_path / "README.md").read_text().endswith("Mine.")


@pytest.mark.parametrize(
    ("kind", "owner"), [(CoralDrafter, "the target's"), (Eagle3Drafter, "its own")]
)
def test_each_draft_head_and_stage_is_named(kind, owner):
    drafter = kind.from_target(tiny_target("llama", torch.float32))
    drafter.heads.add_router(num_groups=5, num_active_groups=2)
    drafter.config.is_router_trained, drafter.config.draft_head = True, "routed"
    drafter.training_record = [
        {"stage": "drafter", "recipe": "hass", "weights": {"num_steps": 3, "csra_weight": 0.0}},
        {"stage": "router", "steps": 4, "max_length": 64},
    ]
    card = make_card(drafter, CardFacts("org/x")).content
    assert f"reads 2 of 5 contiguous groups of {owner} LM head" in card
    assert "| recipe | `hass`: `num_steps` 3 |" in card
    assert "### Stage `router`" in card and "at most 64 tokens" in card


def test_datasets_of_the_hub_are_named_and_files_are_not():
    rows = Dataset.from_dict({"text": ["a"]})
    assert hub_datasets(rows) == []
    rows.info.download_checksums = {
        "hf://datasets/org/talk@abc/one.parquet": None,
        "hf://datasets/org/talk@abc/two.parquet": None,
        "/home/me/three.jsonl": None,
    }
    assert hub_datasets(rows) == ["org/talk"]


def test_metadata_is_yaml_that_begins_the_file(drafter):
    text = str(make_card(drafter, CardFacts("org/x", license="mit", language=["en", "de"])))
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["base_model_relation"] == "adapter" and data["language"] == ["en", "de"]


def test_an_imported_drafter_says_where_it_comes_from(drafter):
    drafter = deepcopy(drafter)
    drafter.training_record = [{"stage": "import", "source": "org/E", "revision": "0ab"}]
    card = make_card(drafter, CardFacts("org/x")).content
    assert "From [`org/E`](https://huggingface.co/org/E) at `0ab`" in card
    drafter.training_record[0] |= {"source": None, "revision": None}
    assert "which one is not recorded" in make_card(drafter, CardFacts("org/x")).content
