"""What a training did and cost, for the config of the drafter that comes out.

In: the trainer, as it goes. Out: a dict of plain values: recipe, data, steps, tokens, seconds,
hardware. `publishing` shows it in the model card.
"""

import json
import time
from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor

from ...measure.hardware import hardware_name
from ..arguments import WEIGHTS, CoralTrainingArguments

if TYPE_CHECKING:
    from ..trainer import CoralTrainer

HUB_DATASET = "hf://datasets/"


class TrainingRecord:
    """Counts tokens and seconds of a stage; travels with its checkpoints."""

    def __init__(self) -> None:
        self._tokens = 0  # of this process
        self._seconds = 0.0  # of the runs before this one
        self._since: float | None = None
        self._entry: dict[str, Any] = {}

    def start(self) -> None:
        """The run begins, or goes on."""
        self._since = time.perf_counter()

    def add(self, num_tokens: int) -> None:
        """Count a batch's trained positions."""
        self._tokens += num_tokens

    def state_dict(self) -> dict[str, float]:
        """Of this process, for a checkpoint."""
        return {"tokens": self._tokens, "seconds": self._elapsed()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a `state_dict`."""
        self._tokens, self._seconds = int(state["tokens"]), state["seconds"]

    def _elapsed(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._seconds + running

    def write(self, trainer: "CoralTrainer", add_up: Callable[[Tensor], Tensor]) -> None:
        """Put what is known now into the config of the drafter; every process calls it.

        Args:
            add_up: sums a tensor over processes.
        """
        tokens = add_up(torch.tensor(self._tokens, device=trainer.args.device)).item()
        found = {
            **_settings(trainer.args),
            **_data(trainer),
            **_progress(trainer),
            "trained_tokens": int(tokens),
            "seconds": round(self._elapsed(), 1),
            "hardware": _hardware(trainer),
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        }
        # settings may be of classes of their own, which a config shall not hold
        self._entry.update(json.loads(json.dumps(found)))
        for drafter in (trainer.drafter, trainer._drafter):
            earlier = [entry for entry in drafter.training_record if entry is not self._entry]
            drafter.training_record = [*earlier, self._entry]


def _settings(args: CoralTrainingArguments) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "stage": args.stage,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "learning_rate": args.learning_rate,
        "max_length": args.max_length,
    }
    if args.stage in ("drafter", "joint"):
        weights = {name: getattr(args, name) for name in ("num_steps", *WEIGHTS)}
        settings |= {"recipe": args.recipe, "weights": weights}
    return settings


def _data(trainer: "CoralTrainer") -> dict[str, Any]:
    dataset = trainer.train_dataset
    tokenizer = trainer.processing_class
    return {
        "datasets": hub_datasets(dataset),
        "rows": len(dataset) if isinstance(dataset, Sized) else None,  # a stream has no length
        "has_chat_template": bool(tokenizer is not None and tokenizer.chat_template),
    }


def hub_datasets(dataset: Any) -> list[str]:
    """Ids of the Hub's datasets that rows come from; files of this machine are not named.

    `datasets` notes where it downloaded from: hf://datasets/org/name@commit/file.
    """
    found = dataset.info.download_checksums if isinstance(dataset, Dataset) else None
    names = (url.removeprefix(HUB_DATASET) for url in found or {} if url.startswith(HUB_DATASET))
    return list(dict.fromkeys(name.partition("@")[0] for name in names))


def _progress(trainer: "CoralTrainer") -> dict[str, Any]:
    args, state = trainer.args, trainer.state
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    acceptance = [
        entry["eval_acceptance_length"]
        for entry in state.log_history
        if entry.get("eval_acceptance_length") is not None
    ]
    return {
        "steps": state.global_step,
        "epochs": round(state.epoch or 0.0, 3),
        "batch": batch,
        "eval_acceptance_length": acceptance[-1] if acceptance else None,
    }


def _hardware(trainer: "CoralTrainer") -> str:
    count, name = trainer.args.world_size, hardware_name(trainer.args.device)
    return name if count == 1 else f"{count} processes, each on {name}"
