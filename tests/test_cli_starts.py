"""`coral-hf train` from a drafter, from other weights, and with an adapter."""

# ruff: noqa: F811  fixtures are imported

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import printed
from peft import PeftModel
from test_cli import TINY_TRAINING, drafter, invoke  # noqa: F401
from test_distributed import launch
from test_examples import folder  # noqa: F401
from test_resume import start
from transformers import AutoModel, AutoModelForCausalLM

from coral_hf.measure.autotune import heads_of

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")


def train(folder, output, *options):
    names = ["--target", folder / "target", "--dataset", folder / "talk.jsonl"]
    return invoke("train", *names, "--output", output, *TINY_TRAINING, *options)


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModel.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_a_lora_is_saved_beside_the_merged_drafter(folder, drafter, tmp_path):
    lora = ["--lora-r", 2, "--lora-target", "fc", "--lora-target", "v_proj", "--router-epochs", 0]
    result = train(folder, tmp_path / "new", "--from", drafter, *lora)
    assert result.exit_code == 0, result.output
    before, after = weights(drafter), weights(tmp_path / "new")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "layers.0.self_attn.v_proj.weight"}
    base = AutoModel.from_pretrained(drafter)
    adapted = PeftModel.from_pretrained(base, tmp_path / "new/adapter")
    assert adapted.peft_config["default"].lora_alpha == 4
    merged = adapted.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], after[name], atol=1e-6) for name in after)
    then, now = base.config, AutoModel.from_pretrained(tmp_path / "new").config
    assert now.draft_head == then.draft_head and now.is_router_trained


@pytest.mark.slow
def test_the_router_is_trained_on_the_merged_drafter(folder, drafter, tmp_path):
    options = ["--from", drafter, "--lora-r", 2, "--router-epochs", 1]
    result = train(folder, tmp_path / "new", *options)
    assert result.exit_code == 0, result.output
    before, after = weights(drafter), weights(tmp_path / "new")
    assert all(
        not torch.equal(after[k], before[k]) for k in ("fc.weight", "heads.router.fc.weight")
    )


def test_a_drafter_that_fits_goes_on_whole_and_another_gives_its_weights(folder, drafter, tmp_path):
    own, tuned = AutoModel.from_pretrained(drafter), tmp_path / "fine-tune"
    shutil.copytree(folder / "target", tuned)
    own.generation_config.update(tree_depth=2)
    own.save_pretrained(tmp_path / "fits")
    own.config.tokenizer_hash = "of another tokenizer"
    own.save_pretrained(tmp_path / "other")
    found = {}
    for name in ("fits", "other"):
        still = ["--target", tuned, "--learning_rate", 0, "--router-epochs", 0]
        result = train(folder, tmp_path / "new" / name, "--from", tmp_path / name, *still)
        assert result.exit_code == 0, result.output
        found[name] = AutoModel.from_pretrained(tmp_path / "new" / name)
        for key, tensor in found[name].state_dict().items():
            assert torch.equal(tensor, own.state_dict()[key])
        assert found[name].config.target_name_or_path == str(tuned)
    fits, other = found.values()
    assert fits.state_dict().keys() == own.state_dict().keys() and fits.config.is_router_trained
    assert fits.generation_config.tree_depth == 2 and other.heads.router is None
    assert len(fits.training_record) == len(own.training_record) + 1 > len(other.training_record)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora-r", 2], "--lora-r goes with --from"),
        (["--lora-alpha", 2], "--lora-alpha goes with --lora-r"),
        (["--from", "a", "--layers", 2], "--layers does not go with --from"),
        (["--from", "./absent"], "no folder ./absent"),
    ],
)
def test_starts_that_contradict_each_other_are_refused(folder, tmp_path, options, message):
    result = train(folder, tmp_path, *options)
    assert result.exit_code != 0 and message in printed(result)


def test_held_out_rows_are_evaluated_and_a_drafter_may_have_two_layers(folder, tmp_path):
    evaluated = ["--hold-out", 1, "--eval_strategy", "steps", "--eval_steps", 1, "--layers", 2]
    result = train(folder, tmp_path, *evaluated, "--router-epochs", 0, "--save_steps", 1)
    assert result.exit_code == 0, result.output
    state = json.loads((tmp_path / "drafter" / "checkpoint-2" / "trainer_state.json").read_text())
    assert sum("eval_acceptance_length" in entry for entry in state["log_history"]) == 2
    assert AutoModel.from_pretrained(tmp_path).config.num_hidden_layers == 2


def test_an_evaluation_without_held_out_rows_is_refused(folder, tmp_path):
    result = train(folder, tmp_path, "--eval_strategy", "steps")
    assert result.exit_code != 0 and "--hold-out" in result.output


@pytest.mark.slow
def test_a_head_stage_trains_the_head_of_a_trained_drafter(folder, tmp_path):
    alone = train(folder, tmp_path / "none", "--stage", "router")
    assert alone.exit_code != 0 and "goes with --from" in printed(alone)
    first = train(folder, tmp_path / "first")  # of so small a vocabulary no router is trained
    assert not (tmp_path / "first" / "router").exists()
    assert first.exit_code == 0, first.output
    own, folder_of = ["--from", tmp_path / "first", "--stage", "router"], tmp_path / "router"
    result = train(folder, folder_of, *own)
    assert result.exit_code == 0, result.output
    assert [path.name for path in folder_of.iterdir() if path.is_dir()] == ["router"]
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    assert heads_of(AutoModel.from_pretrained(folder_of), target) == ["full", "routed"]


@pytest.mark.slow
def test_fresh_head_replaces_the_drafters_own_head(folder, tmp_path):
    first = train(folder, tmp_path / "first", "--grouping", "contiguous", "--router-epochs", 1)
    assert first.exit_code == 0, first.output
    other = ["--from", tmp_path / "first", "--stage", "router", "--grouping", "kmeans"]
    refused = train(folder, tmp_path / "other", *other)
    assert refused.exit_code == 1 and "`grouping` is 'kmeans'" in printed(refused)
    fresh = train(folder, tmp_path / "other", *other, "--fresh-head")
    assert fresh.exit_code == 0, fresh.output
    assert AutoModel.from_pretrained(tmp_path / "other").config.grouping == "kmeans"
    nothing = train(folder, tmp_path / "none", "--fresh-head")
    assert nothing.exit_code == 2 and "--fresh-head goes with --from" in printed(nothing)


@pytest.mark.slow
def test_two_training_runs_cannot_share_an_output_folder(folder, tmp_path):
    process = start(tmp_path / "new", "hold")
    try:
        assert "held\n" in process.stdout
        # of another stage, whose own folder is free
        result = train(folder, tmp_path / "new", "--stage", "joint")
        message = f"{tmp_path / 'new'} is in use: another run"
        assert result.exit_code == 1 and message in printed(result)
        assert not (tmp_path / "new" / "joint").exists()
    finally:
        process.kill()
        process.communicate()
    assert train(folder, tmp_path / "new", "--stage", "joint").exit_code == 0


@pytest.mark.slow
def test_a_run_needs_a_vacant_folder_and_resumes_only_with_its_own_settings(folder, tmp_path):
    options = ["--router-epochs", 1]
    first = train(folder, tmp_path, *options)
    assert first.exit_code == 0, first.output
    before, record = weights(tmp_path), AutoModel.from_pretrained(tmp_path).training_record
    again = train(folder, tmp_path, *options)
    assert again.exit_code == 1 and "holds checkpoint-2 of an earlier run" in printed(again)
    other = train(folder, tmp_path, *options, "--resume", "--learning_rate", 1)
    assert other.exit_code == 1 and "`learning_rate` was 5e-05, now it is 1.0" in printed(other)
    resumed = train(folder, tmp_path, *options, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert all(torch.equal(tensor, before[k]) for k, tensor in weights(tmp_path).items())
    for then, now in zip(record, AutoModel.from_pretrained(tmp_path).training_record, strict=True):
        # draft heads are measured anew; seconds are those of the last checkpoint, too few here
        assert {**now, "seconds": 0, "heads": None} == {**then, "seconds": 0, "heads": None}
    shutil.rmtree(tmp_path / "drafter")
    late = train(folder, tmp_path, *options)  # known before the first stage is trained
    assert late.exit_code == 1 and f"{tmp_path / 'router'} holds checkpoint-" in printed(late)
    assert not (tmp_path / "drafter").exists()


@pytest.mark.slow
def test_a_seed_gives_the_same_bytes(folder, tmp_path):
    found = []
    for name, seed in (("once", 7), ("twice", 7), ("other", 8)):
        torch.rand(len(name))  # earlier draws make no difference
        result = train(folder, tmp_path / name, "--seed", seed, "--router-epochs", 1)
        assert result.exit_code == 0, result.output
        found.append(sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert found[0] == found[1] != found[2]


@pytest.mark.slow
def test_a_seed_gives_the_same_bytes_in_another_process(folder, tmp_path):
    runs = {
        "fresh": ["--seed", "7", "--router-epochs", "1", "--grouping", "frequency"],
        "warm": ["--seed", "7", "--from", "{folder}/fresh", "--stage", "drafter"],
        "lora": ["--seed", "7", "--from", "{folder}/fresh", "--lora-r", "2"],
        "other": ["--seed", "8", "--router-epochs", "0"],
    }
    runs["warm"] += ["--stage", "router"]
    runs = {name: [*TINY_TRAINING, *options] for name, options in runs.items()}
    processes = {}
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        processes[name] = start(tmp_path / name, "commands", data=str(folder), runs=runs)
    found = []
    for name, process in processes.items():
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        files = [tmp_path / name / run / "model.safetensors" for run in runs]
        found.append([sha256(file.read_bytes()).hexdigest() for file in files])
    assert found[0] == found[1] and len(set(found[0])) == len(runs)


@pytest.mark.slow
def test_processes_of_one_training_run_share_its_output_folder(folder, tmp_path):
    names = ["--target", folder / "target", "--dataset", folder / "talk.jsonl"]
    own = ["--output", tmp_path, *TINY_TRAINING]
    own += ["--router-epochs", 1]
    launch("ddp.yaml", Path("coral_hf.cli"), "train", *names, *own, more=("--module",))
    assert AutoModel.from_pretrained(tmp_path).config.draft_head == "routed"
