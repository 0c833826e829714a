"""Training that ends on time, however fast the machine is.

In: a Budget. Out: arguments of a `Trainer`, and a callback that lets the learning rate fall to zero
by whichever of the two limits is nearer: a slow machine's shorter training is a whole one too.
"""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .precision import bf16_pays
from .settings import Budget

WARMUP_STEPS = 20


class BudgetCallback(TrainerCallback):
    """Sets the learning rate and stops the training."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock: what lies before is not training."""
        self.start = time.monotonic()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Linear warm-up over steps, linear decay over the budget."""
        warmup = min(1.0, (state.global_step + 1) / WARMUP_STEPS)
        factor = warmup * max(0.0, 1 - self.spent(state.global_step))
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = args.learning_rate * factor

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop when the time is over; the steps are the trainer's own limit."""
        control.should_training_stop |= self.spent(state.global_step) >= 1

    def spent(self, num_steps: int) -> float:
        """The share of the budget that is used up."""
        seconds = time.monotonic() - self.start
        return max(num_steps / self.budget.max_steps, seconds / self.budget.max_seconds)


def trainer_arguments(budget: Budget, folder: Path, device: torch.device) -> dict[str, Any]:
    """What all trainings of the demo have in common, for `TrainingArguments` and its children."""
    return {
        "output_dir": str(folder),
        "max_steps": budget.max_steps,
        "lr_scheduler_type": "constant",  # `BudgetCallback` is the schedule
        "bf16": bf16_pays(device),
        "use_cpu": device.type == "cpu",
        "logging_steps": max(1, budget.max_steps // 10),
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": device.type == "cuda",
    }
