"""Runs that die at any moment resume as if they had not, and whole checkpoints stay."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import launched
import pytest
import torch
from conftest import tiny_target
from datasets import Dataset, LargeList, Value
from safetensors.torch import load_file
from test_data import tiny_tokenizer
from transformers import AutoModel, TrainerCallback

import coral_hf
from coral_hf import CoralDrafter
from coral_hf.training.pipeline import save
from coral_hf.training.runs.run_record import rows_identity

TESTS = Path(__file__).parent
# epochs are three optimizer steps, so checkpoints lie at their ends and within them; each ends a
# log entry
SETTINGS = {
    "max_steps": 8,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 2,
    "feature_noise": 0.1,
}


def start(folder: Path, name: str = "resumed", **settings) -> subprocess.Popen:
    """A training run in another process."""
    paths = os.pathsep.join([str(Path(coral_hf.__file__).parents[1]), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "launched.py"), str(folder), name, json.dumps(settings)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_same(found: dict, expected: dict) -> None:
    """Compare two runs bit for bit, except for the time they took."""
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        kept = {name for name in theirs if not name.startswith("train_")}
        assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}
    for name, weight in expected["weights"].items():
        assert torch.equal(found["weights"][name], weight), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run without interruptions."""
    return launched.resumed(tmp_path_factory.mktemp("whole"), **SETTINGS)


# within an epoch, and at the end of one
@pytest.mark.parametrize("step", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit(whole, tmp_path, step):
    process = start(tmp_path, kill_at=step, **SETTINGS)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    assert f"checkpoint-{step}" in checkpoints(tmp_path / "run")
    assert_same(launched.resumed(tmp_path, resume=True, **SETTINGS), whole)


@pytest.mark.slow
def test_a_run_killed_while_writing_a_checkpoint_resumes_from_the_one_before(whole, tmp_path):
    process = start(tmp_path, kill_writing=4, save_total_limit=1, **SETTINGS)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    half = tmp_path / "run" / "_incomplete" / "checkpoint-4"
    assert (half / "model.safetensors").exists() and not (half / "trainer_state.json").exists()
    assert checkpoints(tmp_path / "run") == ["checkpoint-3"]
    assert_same(launched.resumed(tmp_path, resume=True, **SETTINGS), whole)
    assert not half.exists()


def test_a_checkpoint_ends_a_log_entry(tmp_path):
    settings = {**SETTINGS, "max_steps": 6, "save_steps": 3}
    logs = launched.resumed(tmp_path, **settings)["logs"]
    assert [entry["step"] for entry in logs if "loss" in entry] == [2, 3, 4, 6]


@pytest.mark.slow
def test_a_run_killed_many_times_has_the_same_result(tmp_path):
    settings = {**SETTINGS, "max_steps": 16, "save_total_limit": 2}
    expected = launched.resumed(tmp_path / "whole", **settings)
    folder, moments, kills = tmp_path / "run", random.Random(0), 0
    while not (tmp_path / "resumed_0.pt").exists():
        before = checkpoints(folder)
        process = start(tmp_path, resume=bool(before), **settings)
        while process.poll() is None and len(set(checkpoints(folder)) - set(before)) < 2:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        for name in checkpoints(folder):
            assert (folder / name / "trainer_state.json").exists()
    assert kills > 3
    assert_same(torch.load(tmp_path / "resumed_0.pt", weights_only=False), expected)


def test_the_best_checkpoint_is_recorded_under_its_final_name_and_kept(tmp_path):
    settings = {**SETTINGS, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    best["eval_prompts"] = 0
    rows = launched.make_rows(8)
    trainer = launched.make_trainer(tmp_path, eval_dataset=rows, **settings, **best)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    found = Path(trainer.state.best_model_checkpoint)
    assert found == tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert state["best_model_checkpoint"] == str(found) and found.is_dir()


class SmallDisk(TrainerCallback):
    """Lets files grow no further than 4 KiB, once a step is done."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = launched.make_trainer(tmp_path, **{**SETTINGS, "save_total_limit": 1})
    trainer.add_callback(SmallDisk(3))
    try:
        with pytest.raises(OSError, match=r"of step 3 could not be written .*MiB are free"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert not (tmp_path / "_incomplete" / "checkpoint-3").exists()  # it would take up room
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == trainer.model.state_dict().keys()
    launched.make_trainer(tmp_path, **SETTINGS).train(resume_from_checkpoint=True)
    assert "checkpoint-8" in checkpoints(tmp_path)


EACH_STEP = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run of two steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("begun")
    launched.make_trainer(folder, max_steps=2, **EACH_STEP).train()
    return folder


def test_a_new_run_is_refused_among_the_checkpoints_of_an_earlier_one(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    trainer = launched.make_trainer(tmp_path / "run", max_steps=4, **EACH_STEP)
    said = "holds checkpoint-2 of an earlier run.* or delete them"
    with pytest.raises(ValueError, match=said):
        trainer.train()
    for name in ("checkpoint-1", "checkpoint-2"):
        assert load_file(tmp_path / "run" / name / "model.safetensors")
        shutil.rmtree(tmp_path / "run" / name)
    trainer.train()
    assert len(checkpoints(tmp_path / "run")) == 4


def test_a_run_resumed_from_an_earlier_checkpoint_replaces_the_later_ones(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    mark = tmp_path / "run" / "checkpoint-2" / "mark"
    mark.touch()
    trainer = launched.make_trainer(tmp_path / "run", max_steps=2, **EACH_STEP)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert (mark.parent / "trainer_state.json").exists() and not mark.exists()
    assert not (tmp_path / "run" / "_incomplete").exists()


def test_a_run_does_not_resume_among_checkpoints_of_another(begun, tmp_path):
    other = launched.make_trainer(tmp_path / "run", max_steps=1, **EACH_STEP)
    other.train()
    shutil.copytree(begun / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    said = "holds checkpoint-1 of another run than .*checkpoint-2"
    with pytest.raises(ValueError, match=said):
        other.train(resume_from_checkpoint=True)
    said = "holds checkpoint-1 of another run than .*begun.*checkpoint-2"
    with pytest.raises(ValueError, match=said):
        other.train(resume_from_checkpoint=str(begun / "checkpoint-2"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 1e-3}, "`learning_rate` was 0.01, now it is 0.001"),
        ({"lr_scheduler_type": "cosine"}, "`lr_scheduler_type` was linear, now it is cosine"),
        ({"seed": 7}, "`seed` was 42, now it is 7"),
        ({"per_device_train_batch_size": 2}, "`per_device_train_batch_size` was 4, now it is 2"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` was 1, now it is 2"),
        ({"recipe": "hass"}, "`top_k_weight` was 0.0, now it is 1.0; `csra_weight` was 0.1"),
        ({"packing": True}, "`packing` was False, now it is True.*`rows` was 24 rows.* is 1 rows"),
        ({"max_length": 99}, "`max_length` was 2048, now it is 99"),
    ],
)
def test_a_run_with_other_settings_does_not_resume(begun, changed, said):
    trainer = launched.make_trainer(begun, **{"max_steps": 2, **EACH_STEP, **changed})
    with pytest.raises(ValueError, match=f"The run of .* began otherwise: .*{said}"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0


def test_a_run_with_other_rows_does_not_resume(begun):
    trainer = launched.make_trainer(begun, max_steps=2, **EACH_STEP)
    trainer.train_dataset = trainer.train_dataset.select(range(23, -1, -1))
    said = "otherwise: `rows` was 24 rows, SHA-256 [0-9a-f]{16}, now it is 24 rows, SHA-256"
    with pytest.raises(ValueError, match=said):
        trainer.train(resume_from_checkpoint=True)


def test_a_run_of_another_target_does_not_resume(begun):
    for target, said in (
        (tiny_target("llama", torch.float32, seed=1), "in float32, SHA-256 .* in float32, SHA-256"),
        (tiny_target("llama", torch.bfloat16), "in float32, SHA-256 .* in bfloat16, SHA-256"),
    ):
        trainer = launched.make_trainer(begun, target, max_steps=2, **EACH_STEP)
        with pytest.raises(ValueError, match=f"otherwise: `target` was {said}"):
            trainer.train(resume_from_checkpoint=True)


def test_a_finished_run_takes_no_further_step(begun):  # in the middle of its first epoch
    trainer = launched.make_trainer(begun, max_steps=2, **EACH_STEP)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    saved = load_file(begun / "checkpoint-2" / "model.safetensors")
    assert all(
        torch.equal(weight, saved[name]) for name, weight in trainer.model.state_dict().items()
    )
    (entry,) = trainer.model.training_record
    (before,) = CoralDrafter.from_pretrained(begun / "checkpoint-2").training_record
    assert entry["trained_tokens"] == before["trained_tokens"] > 0


def test_a_longer_run_warns_if_its_learning_rate_changes(tmp_path, caplog):
    settings = {**SETTINGS, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}
    expected = launched.resumed(tmp_path / "whole", **settings)
    launched.resumed(tmp_path, **{**settings, "max_steps": 4})
    assert_same(launched.resumed(tmp_path, resume=True, **settings), expected)
    assert "resumes with another length" not in caplog.text
    share = {**settings, "warmup_steps": 0.5}  # of a longer run it is longer
    launched.resumed(tmp_path / "share", **{**share, "max_steps": 4})
    launched.resumed(tmp_path / "share", resume=True, **share)
    said = "resumes with another length (`max_steps` was 4, now it is 8): it now follows"
    assert said in caplog.text


def test_a_lengthened_run_does_not_go_back_to_one_step(tmp_path, caplog):
    def steps(folder, length, resume=True):
        trainer = launched.make_trainer(
            folder, max_steps=length, single_step_share=0.5, **EACH_STEP
        )
        trainer.train(resume_from_checkpoint=resume)
        last = trainer.state.log_history[:-1]
        return ["agreement_2" in entry for entry in last if "loss" in entry]

    assert steps(tmp_path, 2, resume=False) == [False, True]
    assert steps(tmp_path, 6) == [False] + [True] * 5
    # and not in a later resume either, of which the checkpoint lies before half of the run
    assert steps(tmp_path, 20) == [False] + [True] * 19
    shutil.rmtree(tmp_path)
    assert steps(tmp_path, 4, resume=False) == [False] * 2 + [True] * 2
    for number in (2, 3, 4):
        shutil.rmtree(tmp_path / f"checkpoint-{number}")
    assert steps(tmp_path, 6) == [False] * 3 + [True] * 3  # which had not left it


def test_a_checkpoint_without_settings_resumes_with_a_warning(begun, tmp_path, caplog):
    for name in checkpoints(begun):
        shutil.copytree(begun / name, tmp_path / name)
        (tmp_path / name / "coral_run.json").unlink()
    trainer = launched.make_trainer(tmp_path, max_steps=3, **EACH_STEP)
    with caplog.at_level("WARNING", "coral_hf"):
        trainer.train(resume_from_checkpoint=True)
    assert "does not name the settings of its run" in caplog.text
    assert trainer.state.global_step == 3


def test_the_digest_of_rows_depends_on_what_is_trained_not_on_its_storage():
    rows = launched.make_rows()
    stored = rows.cast_column("input_ids", LargeList(Value("int16")))
    assert rows_identity(stored) == rows_identity(rows)
    assert rows_identity(rows.select(range(24))) == rows_identity(rows)
    unmasked = rows.map(lambda row: {"labels": row["input_ids"]})
    joined, parted = (
        Dataset.from_dict({"input_ids": ids, "labels": ids})
        for ids in ([[1, 2], [1, 2]], [[1], [2, 1, 2]])
    )
    others = [rows_identity(other) for other in (rows, unmasked, joined, parted)]
    assert len(set(others)) == 4
    assert rows_identity(rows.to_iterable_dataset()) == "a stream"
    assert rows_identity([{"input_ids": [1, 2]}]) == "1 rows"


def test_a_full_disk_keeps_the_finished_drafter_before(tmp_path):
    tokenizer, limits = tiny_tokenizer(), resource.getrlimit(resource.RLIMIT_FSIZE)
    first = launched.make_drafter()
    save(first, tokenizer, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = CoralDrafter.from_target(launched.TARGET, num_hidden_layers=2).float()
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match="The drafter could not be written to .*MiB are free"):
            save(second, tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert AutoModel.from_pretrained(tmp_path).config.num_hidden_layers == 1
    save(second, tokenizer, tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.num_hidden_layers == 2
    assert {path.name for path in tmp_path.iterdir()} == before.keys()


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_until_the_first_ends(tmp_path):
    process = start(tmp_path, "hold")
    try:
        assert "held\n" in process.stdout
        with pytest.raises(ValueError, match=f"{tmp_path} is in use: another run"):
            launched.make_trainer(tmp_path, max_steps=1).train()
    finally:
        process.kill()
        process.communicate()
    trainer = launched.make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.train()  # the lock is given back at the end of a run


def test_two_trainers_of_one_process_do_not_share_a_folder_either(tmp_path):
    second = launched.make_trainer(tmp_path, max_steps=1)

    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            second.train()

    first = launched.make_trainer(tmp_path, max_steps=1)
    first.add_callback(Second())
    with pytest.raises(ValueError, match="is in use: another run"):
        first.train()
