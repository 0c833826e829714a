"""Rows and steps of a run: how many there are, how large, and how long a few of them take.

In: rows of the trainer, the settings of a run. Out: counts, the largest batch, and seconds of an
optimizer step on this machine, for which models are loaded; nothing that is written is kept.
"""

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers import PreTrainedTokenizerBase as Tokenizer

from ...drafters.configuration import FamilyConfig
from ..arguments import CoralTrainingArguments
from ..data import CoralCollator
from ..features import CachedFeatures, write_features
from ..features.writer import row_lengths
from ..steps import step_kind
from ..trainer import CoralTrainer

NUM_STEPS = 32  # at most, fewer of a short run; LEAST_STEPS if they take longer than SECONDS
LEAST_STEPS, SECONDS = 6, 10.0
LEFT_OUT = 2  # steps, the first ones
UNKEPT: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
UNKEPT |= {"disable_tqdm": True, "push_to_hub": False, "load_best_model_at_end": False}
# settings of a run that trains step 1 of the unroll alone, and of one that never does
PARTS: tuple[dict[str, Any], ...]
PARTS = {"num_steps": 1, "csra_weight": 0.0}, {"single_step_share": 0.0}


def largest_batch(
    rows: Any, lengths: np.ndarray, args: CoralTrainingArguments
) -> dict[str, Tensor]:
    """Collate the batch that takes most memory: the longest row, among others as they come.

    Args:
        rows: a `datasets.Dataset` of token ids and labels, or `CachedFeatures`.
        lengths: (rows,), tokens of each.
        args: of the run, which may cut them shorter.

    Returns:
        (batch, length) each, `features` (batch, length, hidden) of a cache.
    """
    order, size = np.argsort(-lengths, kind="stable"), args.per_device_train_batch_size
    others = order[1:]
    if args.train_sampling_strategy != "group_by_length" and len(others):  # of all lengths
        places = (np.arange(size - 1) + 0.5) / max(size - 1, 1) * len(others)
        others = others[places.astype(int)]
    batch = CoralCollator()([rows[int(index)] for index in [order[0], *others[: size - 1]]])
    return {name: part[:, : args.max_length] for name, part in batch.items()}


def lengths_of(rows: Any) -> np.ndarray:
    """Return the tokens of each row, (rows,)."""
    return np.array(rows.lengths) if isinstance(rows, CachedFeatures) else row_lengths(rows)


def num_steps(num_rows: int, args: CoralTrainingArguments) -> int:
    """Count the optimizer steps of a run, as `Trainer` does."""
    if args.max_steps > 0:
        return args.max_steps
    batches = -(-num_rows // (args.per_device_train_batch_size * args.world_size))
    each = -(-batches // args.gradient_accumulation_steps)
    return int(np.ceil(args.num_train_epochs * each))


def seconds_of(length: int, args: CoralTrainingArguments, of_one: float, of_all: float) -> float:
    """Return the seconds of a run of some optimizer steps.

    Args:
        of_one, of_all: seconds of a step that trains step 1 of the unroll alone, and of another.
    """
    alone = args.steps_alone(length)
    return alone * of_one + (length - alone) * of_all


def steps_in(seconds: float, args: CoralTrainingArguments, *of_a_step: float) -> int:
    """Count the optimizer steps that take so long, 1 at least; `of_a_step` as in `seconds_of`."""
    lengths = range(1, int(seconds / min(of_a_step)) + 2)
    return max(1, bisect_right(lengths, seconds, key=lambda n: seconds_of(n, args, *of_a_step)))


def num_checkpoints(steps: int, args: CoralTrainingArguments) -> int:
    """Count the checkpoints of a run that lie on the disk together at most.

    Older ones are deleted after a new one is whole, so that there is one more than the limit.
    """
    strategy = args.save_strategy
    if strategy == "no":
        return 0
    if strategy == "epoch":
        count = int(np.ceil(args.num_train_epochs)) if args.max_steps <= 0 else steps
    else:
        every = args.save_steps if strategy == "steps" else args.eval_steps or args.save_steps
        count = -(-steps // max(int(every if every >= 1 else every * steps), 1))
    return count if args.save_total_limit is None else min(count, args.save_total_limit + 1)


class StepTimer(TrainerCallback):
    """Notes when each optimizer step ends, and stops the run once enough are known."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Note a step."""
        self._ends.append(time.perf_counter())
        is_long = self._ends[-1] - self._ends[0] > SECONDS
        control.should_training_stop |= is_long and len(self._ends) >= LEAST_STEPS

    def seconds(self) -> float:
        """Return the mean of a step."""
        return fmean(after - before for before, after in pairwise(self._ends[LEFT_OUT - 1 :]))


def timed_run(
    target: PreTrainedModel,
    tokenizer: Tokenizer,
    rows: Any,
    stages: Sequence[CoralTrainingArguments],
    config: FamilyConfig,
    features: str = "online",
) -> tuple[list[float], float]:
    """Run a few steps of each stage on rows from all over the dataset.

    Args:
        target: on the CPU; each trainer moves it to the device of the run.
        rows: of the trainer: token ids and labels, or `CachedFeatures`.
        config: of the drafter.
        features: "online", or the format in which they are cached.

    Returns:
        The seconds of an optimizer step of each stage, and of a token whose features are cached.
    """
    kind, found, token = step_kind(config.model_type), list[float](), 0.0
    drafter, is_written = kind.drafter(config), features not in ("online", "cached")
    with TemporaryDirectory() as folder:
        for args in stages:
            length = num_steps(len(rows), args)
            most = min(NUM_STEPS, max(length, LEAST_STEPS))
            size = args.per_device_train_batch_size * args.gradient_accumulation_steps
            part = rows
            if not isinstance(rows, CachedFeatures):
                batches = LEAST_STEPS if is_written else most
                count = min(size * batches * args.world_size, len(rows))
                part = rows.select([index * len(rows) // count for index in range(count)])
            if is_written:
                start, cache = time.perf_counter(), Path(folder, f"features-{args.stage}")
                write_features(target, part, cache, features, layers=kind.layers(config))
                part = CachedFeatures(cache)
                token = (time.perf_counter() - start) / sum(part.lengths)
            alone, seconds = args.steps_alone(length), [0.0, 0.0]
            for index, number in enumerate((alone, length - alone)):
                if number:
                    own: dict[str, Any] = {"output_dir": str(Path(folder, args.stage))}
                    own |= {"max_steps": most, **PARTS[index]}
                    timer, short = StepTimer(), replace(args, **own, **UNKEPT)
                    given = {"train_dataset": part, "callbacks": [timer]}
                    CoralTrainer(drafter, target, short, tokenizer, **given).train()
                    seconds[index] = timer.seconds()
            found.append(seconds_of(length, args, *seconds) / length)
    return found, token
