"""Losses that are not finite stop training, name their batch, and leave checkpoints whole."""

import launched
import pytest
import torch
from conftest import tiny_target
from transformers import TrainerCallback

from coral_hf.training.steps.coral import CoralStep

SAVING = {"save_strategy": "steps", "save_steps": 1}


def break_embedding(target, token: int, value: float) -> None:
    """From now on, features of rows with a token are not finite."""
    with torch.no_grad():
        target.get_input_embeddings().weight[token] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_name_their_row(tmp_path, value):
    target = tiny_target("llama", torch.float32)
    trainer = launched.make_trainer(tmp_path, target, per_device_train_batch_size=8, **SAVING)
    row = trainer.train_dataset[3]["input_ids"]
    rare = next(t for t in row if sum(t in r for r in trainer.train_dataset["input_ids"]) < 8)
    broken = [r[:8] for r in trainer.train_dataset["input_ids"] if rare in r]
    break_embedding(target, rare, value)
    with pytest.raises(FloatingPointError, match="target's features are not finite") as error:
        trainer.train()
    step = trainer.state.global_step
    assert f"of optimizer step {step + 1} in process 0" in str(error.value)
    named = [row for row in broken if str(row) in str(error.value)]
    assert named and str(error.value).count("[") == len(named)
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved == [f"checkpoint-{n}" for n in range(1, step + 1)]


class BrokenStep(CoralStep):
    """One of the losses overflows in the second batch of the third step."""

    batches = 0

    def losses(self, drafter, trained):
        self.batches += 1
        losses = super().losses(drafter, trained)
        if self.batches == 6:
            losses.terms["tokens"] *= float("inf")
        return losses


class Weights(TrainerCallback):
    """Keeps the weights of the last whole step."""

    def on_step_end(self, args, state, control, model, **kwargs):
        self.found = [weight.detach().clone() for weight in model.parameters()]


def test_a_loss_that_is_not_finite_is_named_with_its_batch(tmp_path):
    accumulated = {"gradient_accumulation_steps": 2, **SAVING}
    trainer = launched.make_trainer(tmp_path, **accumulated)
    trainer.step = BrokenStep(trainer.drafter.config, trainer.target, trainer.args)
    weights = Weights()
    trainer.add_callback(weights)
    expected = r"loss \(tokens, total\) of rows 0 \[.* batch 2 of optimizer step 3"
    with pytest.raises(FloatingPointError, match=expected):
        trainer.train()
    for found, before in zip(trainer.model.parameters(), weights.found, strict=True):
        assert torch.equal(found, before)
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2"]


def test_a_batch_without_labels_is_named(tmp_path):
    trainer = launched.make_trainer(tmp_path)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": [-100] * 14})
    with pytest.raises(FloatingPointError, match="Nothing is trained in rows 0 "):
        trainer.train()


class BrokenGradient(TrainerCallback):
    """A gradient that overflows although the loss is finite."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            model.fc.weight.grad[0, 0] = float("nan")


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = launched.make_trainer(tmp_path, **SAVING)
    trainer.add_callback(BrokenGradient())
    with pytest.raises(FloatingPointError, match="weights are not finite, so no checkpoint"):
        trainer.train()
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2"]


def test_evaluation_is_not_watched(tmp_path):
    target = tiny_target("llama", torch.float32)
    trainer = launched.make_trainer(tmp_path, target, eval_prompts=0)
    break_embedding(target, 5, float("nan"))
    trainer.evaluate(launched.make_rows())
    assert not trainer._guard._watched
