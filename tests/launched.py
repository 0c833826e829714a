"""What tests start in processes of their own: small trainings with their results in a folder.

accelerate launch --num_processes 2 tests/launched.py FOLDER NAME '{"max_steps": 2}'
python tests/launched.py FOLDER NAME '{"max_steps": 2}' --two    # the same, of one set of imports
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState, debug_launcher
from conftest import VOCAB, invoke, scatter_weights, tiny_target
from datasets import Dataset
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from coral_hf import (
    AssistantTrainer,
    AssistantTrainingArguments,
    CoralDrafter,
    CoralTrainer,
    CoralTrainingArguments,
    Eagle3Drafter,
    MedusaDrafter,
)
from coral_hf.drafters.model import Drafter
from coral_hf.training.assistant import small_model
from coral_hf.training.runs.checkpoints import sole_run
from coral_hf.training.steps.base import add_noise

SETTINGS = {
    "recipe": "coral",
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    # the batch of a device would be other negatives on two devices
    "csra_negatives": "sequence",
}


# before any TrainingArguments: under ZeRO-3 what is made later is taken apart
TARGET = tiny_target("llama", torch.float32)


def make_rows(count: int = 24, length: int = 14) -> Dataset:
    """Random texts, each with another number of trained tokens."""
    ids = torch.randint(2, VOCAB, (count, length), generator=torch.Generator().manual_seed(0))
    rows = []
    for index, text in enumerate(ids.tolist()):
        labels = [-100] * (2 + index % 5) + text[2 + index % 5 :]
        rows.append({"input_ids": text, "attention_mask": [1] * length, "labels": labels})
    return Dataset.from_list(rows)


def make_drafter(kind: type[Drafter] = CoralDrafter) -> Drafter:
    """A random drafter of `TARGET`."""
    torch.manual_seed(0)
    drafter = kind.from_target(TARGET).float()
    # as it is initialised, the gradients of its attention are tiny
    scatter_weights(drafter)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.mul_(0.3)
    return drafter


def make_trainer(folder, target=None, trainer_class=CoralTrainer, eval_dataset=None, **settings):
    """A trainer of a fresh drafter, or of `settings["drafter"]`."""
    target = TARGET if target is None else target
    drafter = settings.pop("drafter", None) or make_drafter()
    args = CoralTrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings})
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate offers FSDP on accelerators alone; torch knows it on CPUs too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return trainer_class(
        model=drafter,
        target_model=target,
        args=args,
        train_dataset=make_rows(),
        eval_dataset=eval_dataset,
    )


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimizer step as they are applied."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradients = {
            name.removeprefix("module."): weight.grad
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }
        self.found.append(
            {
                name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
                for name, gradient in gradients.items()
            }
        )


class NoisyTrainer(CoralTrainer):
    """Draws a random number in each batch, as dropout would, so that resuming has to restore it."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * (0.5 + torch.rand(()))


class KillAt(TrainerCallback):
    """Ends this process as the kernel would, before the optimizer step after `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def results(trainer: CoralTrainer, drafter: CoralDrafter | None = None) -> dict:
    """What a test compares; `drafter` is the user's own where the trainer shards a copy of it."""
    weights = (drafter or trainer.drafter).named_parameters()
    return {
        "logs": trainer.state.log_history,
        "weights": {name: weight.detach().clone() for name, weight in weights},
    }


# by recipe: drafters whose own LM heads are trained; gradients of EAGLE-3 pass from step to step
FAMILIES = {"eagle3": Eagle3Drafter, "medusa": MedusaDrafter}


def of_family(recipe: str, folder: Path, **settings) -> dict:
    """What a drafter of another family learns."""
    given = {"drafter": make_drafter(FAMILIES[recipe]), "recipe": recipe, "num_steps": 3}
    trainer, gradients = make_trainer(folder / recipe, **given, **settings), Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return {**results(trainer), "gradients": gradients.found}


STAGES = ("drafter", "router", "joint")


def all_stages(folder: Path, **settings) -> dict:
    """Each stage on the drafter of the one before it."""
    found: dict = {}
    drafter = make_drafter()
    for stage in STAGES:
        own = {"num_groups": 4, **settings}
        trainer = make_trainer(folder / stage, drafter=drafter, stage=stage, **own)
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        found[stage] = {**results(trainer, drafter), "gradients": gradients.found}
    found["record"] = drafter.training_record
    found["shards"] = sum(isinstance(weight, DTensor) for weight in TARGET.parameters())
    return found


class BrokenRows(CoralTrainer):
    """A target whose features are not finite from the third step on, in process 1 alone."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 2 and self.args.process_index == 1:
            features = self.step.features.read(inputs).clone()
            features[0, 8] = float("nan")
            inputs = {**inputs, "features": features}
        return super().compute_loss(model, inputs, *args, **kwargs)


def stops_at_a_broken_row(folder: Path) -> dict:
    """The error that this process ends its training with, and the folder of checkpoints."""
    trainer = make_trainer(
        folder / "broken", trainer_class=BrokenRows, save_strategy="steps", save_steps=1
    )
    try:
        trainer.train()
    except FloatingPointError as error:
        return {"error": str(error), "saved": sorted(p.name for p in (folder / "broken").iterdir())}
    return {"error": None}


def assistant(folder: Path, **settings) -> dict:
    """The gradients of a small language model, and what an evaluation finds."""
    torch.manual_seed(0)
    args = {name: value for name, value in SETTINGS.items() if name != "csra_negatives"}
    args = AssistantTrainingArguments(
        output_dir=str(folder), loss="tvd", per_device_eval_batch_size=4, **{**args, **settings}
    )
    rows = make_rows()
    data = {"train_dataset": rows, "eval_dataset": rows}
    trainer = AssistantTrainer(small_model(TARGET.config, num_layers=1), args, TARGET, **data)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    metrics = trainer.evaluate()
    names = ("eval_loss", "eval_expected_acceptance", "eval_simulated_acceptance_length")
    return {"gradients": gradients.found, "metrics": {name: metrics[name] for name in names}}


def all_at_once(folder: Path, **settings) -> dict:
    """Every check of two processes, in one launch."""
    accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    found: dict = {}
    for how, given in {"plain": settings, "accumulated": settings | accumulated}.items():
        found[how] = all_stages(folder / how, **given)
        found[how] |= {name: of_family(name, folder / how, **given) for name in FAMILIES}
    found["broken"] = stops_at_a_broken_row(folder)
    torch.manual_seed(0)
    found["noise"] = add_noise(torch.zeros(4, 8), 0.1, PartialState().process_index)
    return found


def commands(folder: Path, data: str, runs: dict[str, list[str]]) -> None:
    """Trains drafters by the command line, each in a folder of its own."""
    names = ["--target", f"{data}/target", "--dataset", f"{data}/talk.jsonl"]
    for name, options in runs.items():
        torch.rand(os.getpid() % 100)  # what came before has no influence
        options = [option.format(folder=folder) for option in options]
        done = invoke("train", *names, "--output", folder / name, *options)
        assert done.exit_code == 0, done.output


class DiesWriting(NoisyTrainer):
    """Ends this process as the kernel would, when half of a checkpoint is written."""

    kill_step: int

    def _save_rng_state(self, output_dir):
        if self.state.global_step == self.kill_step:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def hold(folder: Path) -> None:
    """Holds a folder as a training does, until the process is killed."""
    with sole_run(folder, is_main=True):
        print("held", flush=True)
        time.sleep(600)


def resumed(
    folder: Path,
    kill_at: int | None = None,
    kill_writing: int | None = None,
    resume: bool = False,
    **settings,
) -> dict:
    """A run that writes checkpoints, is killed, or goes on."""
    trainer_class = NoisyTrainer if kill_writing is None else DiesWriting
    trainer = make_trainer(folder / "run", trainer_class=trainer_class, **settings)
    trainer.kill_step = kill_writing
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    trainer.train(resume_from_checkpoint=resume)
    return results(trainer)


def zero(folder: Path, **settings) -> dict:
    """Two stages under DeepSpeed, and a run that goes on from the second of four steps."""
    found = all_stages(folder, **settings)
    settings |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "feature_noise": 0.1}
    settings["optim"] = "adamw_torch"
    for name, start in (("whole", None), ("resumed", str(folder / "run" / "checkpoint-2"))):
        trainer = make_trainer(folder / "run", trainer_class=NoisyTrainer, **settings)
        trainer.train(resume_from_checkpoint=start)
        found[name] = results(trainer)
    found["zero_stage"] = trainer.accelerator.state.deepspeed_plugin.zero_stage
    return found


def save(folder: Path, name: str, settings: dict) -> None:
    """Run a function of this file, and save what it finds beside its rank."""
    if distributed.is_initialized():  # in a fork, which finds its rank there alone
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(distributed.get_rank())
    found = globals()[name](folder, **settings)
    torch.save(found, folder / f"{name}_{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    if "--two" in sys.argv:
        debug_launcher(save, asked)
    else:
        save(*asked)
