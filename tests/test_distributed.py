"""Two processes train what one would, and stop together; both run for real, on the CPU."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import launched
import pytest
import torch
from conftest import slowly
from transformers import AutoModel

import coral_hf

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "examples" / "accelerate"
SETTINGS = '{"per_device_train_batch_size": 2, "max_steps": 3, "optim": "sgd"}'


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(config: str, script: Path, *arguments: object, more: tuple = ()) -> str:
    """Two processes of a script by `accelerate launch`; their output."""
    command = ["-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(CONFIGS / config), "--num_processes", "2", *more]
    command += ["--mixed_precision", "no", "--main_process_port", str(free_port())]
    # accelerate knows no DeepSpeed on a CPU that it is told to use, but it does without a GPU
    use_cpu = str("deepspeed" not in config).lower()
    return run_python(*command, script, *arguments, ACCELERATE_USE_CPU=use_cpu)


def run_python(*words: object, **variables: str) -> str:
    """The output of a program, which fails with its errors."""
    paths = os.pathsep.join([str(Path(coral_hf.__file__).parents[1]), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    run_python(TESTS / "launched.py", folder, "all_at_once", SETTINGS, "--two")
    return [torch.load(folder / f"all_at_once_{process}.pt") for process in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process finds on batches of twice the size."""
    folder = tmp_path_factory.mktemp("one")
    settings = {"per_device_train_batch_size": 4, "max_steps": 3, "optim": "sgd"}
    stages = launched.all_stages(folder, **settings)
    own = {name: launched.of_family(name, folder, **settings) for name in launched.FAMILIES}
    return {**stages, **own}


@pytest.mark.parametrize("how", ["plain", *slowly("accumulated")])
@pytest.mark.parametrize("stage", [*launched.STAGES, *launched.FAMILIES])
def test_two_processes_have_the_gradients_of_one_with_twice_the_batch(one, two, how, stage):
    assert len(one[stage]["gradients"]) == 3
    for step, expected in enumerate(one[stage]["gradients"]):
        for process in two:
            found = process[how][stage]["gradients"][step]
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
                assert gradient.abs().max() > 1e-5  # so that equality says something


def test_the_training_record_counts_the_tokens_of_all_processes(one, two):
    expected = [entry["trained_tokens"] for entry in one["record"]]
    for process in two:
        record = process["plain"]["record"]
        assert [entry["stage"] for entry in record] == [*launched.STAGES]
        assert [entry["trained_tokens"] for entry in record] == expected
        assert all(entry["hardware"].startswith("2 processes") for entry in record)


@pytest.mark.parametrize("how", ["plain", "accumulated"])
@pytest.mark.parametrize("stage", launched.STAGES)
def test_two_processes_end_with_the_weights_of_one(one, two, how, stage):
    first, second = (process[how][stage]["weights"] for process in two)
    for name, weight in one[stage]["weights"].items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["plain", "accumulated"])
@pytest.mark.parametrize("stage", launched.STAGES)
def test_logged_losses_are_averages_over_all_processes(one, two, how, stage):
    name = "router_loss" if stage == "router" else "agreement_1"
    for expected, *found in zip(
        one[stage]["logs"][:3], *(process[how][stage]["logs"] for process in two), strict=False
    ):
        assert name in expected
        for entry in found:
            assert entry == pytest.approx(expected, rel=1e-4)


def test_a_loss_that_is_not_finite_in_one_process_stops_both(two):
    errors = [process["broken"]["error"] for process in two]
    assert "features are not finite in rows 0 [" in errors[1]
    assert "batch 1 of optimizer step 3 in process 1" in errors[1]
    assert errors[0] == errors[1]
    for process in two:
        saved = process["broken"]["saved"]
        assert [name for name in saved if name[0] != "_"] == ["checkpoint-1", "checkpoint-2"]


def test_each_process_draws_its_own_feature_noise(two):
    first, second = (process["noise"] for process in two)
    assert 0.05 < min(first.abs().max(), second.abs().max()) < 0.1
    assert not (first == second).any()


@pytest.mark.slow
def test_fsdp_shards_drafter_and_target_and_trains_the_same(one, tmp_path):
    launch("fsdp2.yaml", TESTS / "launched.py", tmp_path, "all_stages", SETTINGS)
    found = torch.load(tmp_path / "all_stages_1.pt")
    layer = len(list(launched.TARGET.model.layers[0].parameters()))
    assert found["shards"] == layer * len(launched.TARGET.model.layers)
    for stage in launched.STAGES:
        for name, gradient in one[stage]["gradients"][2].items():
            close = {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(found[stage]["gradients"][2][name], gradient, **close)
        for name, weight in one[stage]["weights"].items():
            torch.testing.assert_close(found[stage]["weights"][name], weight, rtol=1e-4, atol=1e-6)
        for entry, expected in zip(found[stage]["logs"][:3], one[stage]["logs"][:3], strict=True):
            assert entry == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_the_same_and_resumes_bit_for_bit(one, tmp_path, stage):
    settings = json.dumps({**json.loads(SETTINGS), "use_cpu": False, "ddp_backend": "gloo"})
    launch(f"deepspeed_zero{stage}.yaml", TESTS / "launched.py", tmp_path, "zero", settings)
    first, second = (torch.load(tmp_path / f"zero_{process}.pt") for process in (0, 1))
    assert first["zero_stage"] == stage
    for part in launched.STAGES:
        for name, weight in one[part]["weights"].items():
            torch.testing.assert_close(first[part]["weights"][name], weight, rtol=1e-4, atol=1e-6)
            assert torch.equal(first[part]["weights"][name], second[part]["weights"][name])
        for entry, expected in zip(first[part]["logs"][:3], one[part]["logs"][:3], strict=True):
            assert entry == pytest.approx(expected, rel=1e-4)
    assert first["resumed"]["logs"][:4] == first["whole"]["logs"][:4]
    for name, weight in first["whole"]["weights"].items():
        assert torch.equal(first["resumed"]["weights"][name], weight)


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_accelerate_reads_each_config_as_intended(config):
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(CONFIGS / config))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(config.removesuffix(".yaml"), "DEEPSPEED")
    assert str(read.distributed_type.value) == kind
    assert read.mixed_precision == "bf16" and read.num_processes == 8
    if kind == "DEEPSPEED":
        assert f"zero{read.deepspeed_config['zero_stage']}.yaml" in config


@pytest.mark.slow
def test_the_example_needs_no_change_for_two_processes(tmp_path):
    from test_examples import save_target_and_talk

    save_target_and_talk(tmp_path)
    names = ["--target", tmp_path / "target", "--dataset", tmp_path / "talk.jsonl"]
    script = CONFIGS.parent / "train.py"
    launch("ddp.yaml", script, *names, "--output", tmp_path / "drafter", "--max-steps", 2)
    assert AutoModel.from_pretrained(tmp_path / "drafter").config.draft_head == "routed"
