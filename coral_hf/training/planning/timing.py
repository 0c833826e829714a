"""Hours of a run, from a few steps of it on this machine.

In: the target, rows and settings of a run. Out: seconds of an optimizer step of each stage, and of
a cached token where features are cached. Models are loaded; nothing that is written is kept.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ...drafters.configuration import FamilyConfig
from ..arguments import CoralTrainingArguments
from ..features import CachedFeatures, write_features
from ..steps import step_kind
from ..trainer import CoralTrainer
from .rows import num_steps

NUM_STEPS = 32  # at most, fewer of a short run; LEAST_STEPS if they take longer than SECONDS
LEAST_STEPS, SECONDS = 6, 10.0
LEFT_OUT = 2  # steps, the first ones
UNKEPT: dict[str, Any] = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": "none",
    "disable_tqdm": True,
    "plots": False,
}


class Seconds(NamedTuple):
    """What a run takes on this machine."""

    steps: list[float]  # an optimizer step of each stage
    token: float = 0.0  # a token whose features are cached


class StepTimer(TrainerCallback):
    """Notes how long each optimizer step takes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Note a step, and stop the run once enough are known."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        if len(self.seconds) >= LEAST_STEPS and sum(self.seconds) > SECONDS:
            control.should_training_stop = True


def timed_run(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    stages: Sequence[CoralTrainingArguments],
    config: FamilyConfig,
    features: str = "online",
) -> Seconds:
    """Run a few steps of each stage on rows from all over the dataset.

    Args:
        target: on the CPU; each trainer moves it to the device of the run.
        rows: of the trainer: token ids and labels, or `CachedFeatures`.
        config: of the drafter.
        features: "online", or the format in which they are cached.
    """
    kind, found, token = step_kind(config.model_type), list[float](), 0.0
    drafter = kind.drafter(config)
    with TemporaryDirectory() as folder:
        for args in stages:
            most = min(NUM_STEPS, max(num_steps(len(rows), args), LEAST_STEPS))
            own: dict[str, Any] = {"output_dir": str(Path(folder, args.stage)), "max_steps": most}
            short = replace(args, **own, **UNKEPT)
            size = args.per_device_train_batch_size * args.gradient_accumulation_steps
            part, is_cached = rows, isinstance(rows, CachedFeatures)
            if not is_cached:
                batches = most if features == "online" else LEAST_STEPS
                count = min(size * batches * args.world_size, len(rows))
                part = rows.select([index * len(rows) // count for index in range(count)])
            if features != "online" and not is_cached:
                start, cache = time.perf_counter(), Path(folder, f"features-{args.stage}")
                layers = kind.layers(config)
                write_features(target, part, cache, features, layers=layers)
                part = CachedFeatures(cache)
                token = (time.perf_counter() - start) / sum(part.lengths)
            seconds, share = 0.0, args.resolved.single_step_share
            for alone, weight in ((0.0, 1 - share), (1.0, share)):
                if weight:
                    timer = StepTimer()
                    given = {"train_dataset": part, "callbacks": [timer]}
                    part_args = replace(short, single_step_share=alone)
                    CoralTrainer(drafter, target, part_args, tokenizer, **given).train()
                    seconds += weight * fmean(timer.seconds[LEFT_OUT:])
            found.append(seconds)
    return Seconds(found, token)
