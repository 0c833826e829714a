"""A training that dies at any moment goes on as if it had not, and keeps what is whole."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import launched
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import coral_hf

TESTS = Path(__file__).parent
# epochs are three optimizer steps, so checkpoints lie at their ends, within them, and between the
# two steps of a log entry
SETTINGS = {
    "max_steps": 8,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 2,
    "feature_noise": 0.1,
}


def start(folder: Path, name: str = "resumed", **settings) -> subprocess.Popen:
    """A training in a process of its own."""
    paths = os.pathsep.join([str(Path(coral_hf.__file__).parents[1]), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "launched.py"), str(folder), name, json.dumps(settings)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_same(found: dict, expected: dict) -> None:
    """Two runs, bit for bit, but for how long they took."""
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        kept = {name for name in theirs if not name.startswith("train_")}
        assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}
    for name, weight in expected["weights"].items():
        assert torch.equal(found["weights"][name], weight), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, which nothing disturbs."""
    return launched.resumed(tmp_path_factory.mktemp("whole"), **SETTINGS)


@pytest.mark.parametrize("step", [3, 4])  # at the end of an epoch, and within one
def test_a_killed_training_goes_on_bit_for_bit(whole, tmp_path, step):
    process = start(tmp_path, kill_at=step, **SETTINGS)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    assert f"checkpoint-{step}" in checkpoints(tmp_path / "run")
    assert_same(launched.resumed(tmp_path, resume=True, **SETTINGS), whole)


def test_a_training_killed_as_it_writes_a_checkpoint_goes_on_from_the_one_before(whole, tmp_path):
    process = start(tmp_path, kill_writing=4, save_total_limit=1, **SETTINGS)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    half = tmp_path / "run" / "_incomplete" / "checkpoint-4"
    assert (half / "model.safetensors").exists() and not (half / "trainer_state.json").exists()
    assert checkpoints(tmp_path / "run") == ["checkpoint-3"]
    assert_same(launched.resumed(tmp_path, resume=True, **SETTINGS), whole)
    assert not half.exists()


@pytest.mark.slow
def test_a_training_killed_again_and_again_comes_to_the_same_end(tmp_path):
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


def test_the_best_checkpoint_is_known_by_its_final_name_and_kept(tmp_path):
    settings = {**SETTINGS, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
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


def test_a_disk_that_cannot_take_a_checkpoint_leaves_the_one_before(tmp_path):
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


def test_a_checkpoint_of_an_earlier_run_is_replaced(tmp_path):
    launched.make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    mark = tmp_path / "checkpoint-1" / "mark"
    mark.touch()
    launched.make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists() and not mark.exists()
    assert not (tmp_path / "_incomplete").exists()


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path):
    process = start(tmp_path, "hold")
    try:
        assert "held\n" in process.stdout
        with pytest.raises(ValueError, match=f"{tmp_path} is in use: process {process.pid} on"):
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
    with pytest.raises(ValueError, match=f"is in use: process {os.getpid()} on"):
        first.train()
