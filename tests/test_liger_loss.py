"""Liger's kernel gives the classification loss of the plain form; run by Triton's interpreter."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import launched
import pytest
import torch
from loss_inputs import features, make_head, plain_token_loss

import coral_hf
from coral_hf import CoralTrainingArguments
from coral_hf.training.losses import liger_loss
from coral_hf.training.losses.token_loss import TokenWeights

TESTS = Path(__file__).parent
CASES = [
    {"finish": finish, "chunk_size": chunk_size, "weight": weight, "dtype": dtype}
    for finish, chunk_size, weight, dtype in [
        ({}, 4, 1.0, "float32"),
        ({}, 128, 0.1, "float32"),
        ({"softcap": 2.0}, 4, 0.1, "float32"),
        ({"scale": 0.3}, 11, 1.0, "float32"),
        ({"scale": 1e4}, 4, 1.0, "float32"),
        ({}, 4, 1.0, "bfloat16"),
    ]
]


def has_liger() -> bool:
    try:
        return tuple(map(int, importlib.metadata.version("liger-kernel").split("."))) >= (0, 8, 5)
    except importlib.metadata.PackageNotFoundError:
        return False


needs_liger = pytest.mark.skipif(not has_liger(), reason=f"{liger_loss.REQUIRED} is not installed")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the kernel finds in a process whose Triton interprets."""
    folder = tmp_path_factory.mktemp("liger")
    paths = os.pathsep.join([str(Path(coral_hf.__file__).parents[1]), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(TESTS / "liger_in_interpreter.py"), str(folder)]
    done = subprocess.run(
        [*command, json.dumps(CASES)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(folder / "found.pt", weights_only=False)


@needs_liger
@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_the_kernel_equals_the_plain_form_in_value_and_gradient(found, number):
    case, ours = CASES[number], found["losses"][number]
    predicted, target = features()
    head = make_head(getattr(torch, case["dtype"]), **case["finish"])
    weights, steps = TokenWeights(case["weight"]), torch.tensor([1.0, 0.5, -2.0])
    plain = plain_token_loss(predicted, target, head.logits, weights, steps)
    torch.testing.assert_close(ours["loss"], plain.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["classification"], plain.classification, rtol=1e-4, atol=1e-5)
    assert ours["agreed"].equal(plain.agreed)
    (gradient,) = torch.autograd.grad(plain.loss, predicted)
    close = 3e-2 if case["dtype"] == "bfloat16" else 1e-5
    torch.testing.assert_close(ours["gradient"], gradient, rtol=close, atol=close)
    assert gradient.abs().max() > 1e-2  # so that equality says something


@needs_liger
@pytest.mark.slow
def test_a_run_with_the_kernel_logs_the_same_losses(found, tmp_path):
    rows = launched.make_rows(4)
    trainer = launched.make_trainer(tmp_path, eval_dataset=rows, max_steps=3, eval_prompts=0)
    trainer.train()
    trainer.evaluate()
    for ours, plain in zip(found["logs"], trainer.state.log_history, strict=True):
        names = [name for name in plain if "second" not in name and "time" not in name]
        assert {name: ours[name] for name in names} == pytest.approx(
            {name: plain[name] for name in names}, rel=1e-4
        )


@needs_liger
def test_the_kernel_is_refused_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="training runs on the CPU, for which Triton compiles no"):
        launched.make_trainer(tmp_path, use_liger_kernel=True)


def test_a_liger_without_the_kernel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(liger_loss, "REQUIRED", "liger-kernel>=999")
    with pytest.raises(ImportError, match="`use_liger_kernel` needs it: pip install liger-kernel"):
        launched.make_trainer(tmp_path, use_liger_kernel=True)


@pytest.mark.parametrize(
    "settings", [{"recipe": "hass"}, {"classification_weight": 0.0}], ids=["top_k", "no weight"]
)
def test_the_kernel_is_refused_for_losses_that_it_does_not_compute(tmp_path, settings):
    with pytest.raises(ValueError, match="`use_liger_kernel` computes the classification loss"):
        CoralTrainingArguments(output_dir=str(tmp_path), use_liger_kernel=True, **settings)
