"""What a drafter is worth while it is trained: tokens per target pass, decoded and replayed.

In: held-out rows, and what the unroll predicts for them. Out: metrics by name, defined in
`docs/evaluation.md`. Decoded: the target answers prompts with the drafter, by the tree decoding of
`generate`. Simulated: chain decoding replayed over the rows' own text, see `replay.py`.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import IterableDataset

from ...decoding.settings import TREE_DEFAULTS
from ...drafters.coral.modeling import CoralDrafter
from ...target import Target, max_positions, text_config
from ..arguments import CoralTrainingArguments
from ..data.encoding import IGNORED
from .replay import replayed_rounds
from .rounds import AnswerSettings, decoded_rounds
from .routing import NAMES as ROUTING
from .routing import RoutingCounts

# names of metrics that evaluations give here; a trainer may add others of its own
OURS = re.compile(r"(\w+_)?(loss|acceptance_length|[a-z0-9_]+_depth_\d+)")


class Evaluation:
    """The acceptance metrics of a trainer's evaluations."""

    def __init__(self, target: Target, args: CoralTrainingArguments):
        self.target = target
        self.args = args
        self.is_running = False
        self._replayed: list[int] = []  # tokens of each round
        self._routing: RoutingCounts | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take notes, and leave the random state of the training as it was."""
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.is_running = True
            try:
                yield
            finally:
                self.is_running = False
                self._clear()

    def _clear(self) -> None:
        self._replayed.clear()
        self._routing = None

    def num_steps(self, drafter: CoralDrafter) -> int:
        """Steps of the unroll: in an evaluation as many as the tree has levels, or more."""
        assert self.args.num_steps is not None, "the recipe gives what is not set"
        return max(self.args.num_steps, tree_depth(drafter) if self.is_running else 0)

    def note(
        self, drafter: CoralDrafter, predicted: Tensor, features: Tensor, labels: Tensor
    ) -> None:
        """Replay chain decoding over a batch, and ask the router, where an evaluation runs.

        Args:
            drafter: without wrappers.
            predicted: (steps, batch, length - 1, hidden), of `num_steps`.
            features: (batch, length, hidden), the target's.
            labels: (batch, length).
        """
        if not self.is_running:
            return
        levels = predicted[: tree_depth(drafter)]
        self._replayed += replayed_rounds(drafter, self.target, levels, features, labels)
        if drafter.config.is_router_trained:
            self._routing = self._routing or RoutingCounts(len(levels))
            # position t predicts feature t + 1, whose token is t + 2
            trained = labels[:, 2:] != IGNORED
            guessed, true = levels[:, :, :-1][:, trained], features[:, 1:-1][trained]
            self._routing.add(drafter, self.target, guessed, true)

    def metrics(
        self, drafter: CoralDrafter, dataset: Iterable, accelerator: Accelerator
    ) -> dict[str, float]:
        """The metrics of an evaluation by name, the same in every process.

        Each process decodes its share of the prompts.

        Args:
            drafter: without wrappers, in evaluation mode.
            dataset: the rows that were evaluated.
            accelerator: of the trainer.
        """
        depth = tree_depth(drafter)

        def counted(rounds: list[int]) -> Tensor:
            return accelerator.reduce(count_rounds(rounds, depth).to(accelerator.device)).cpu()

        found = {"simulated_acceptance_length": acceptance_length(counted(self._replayed))}
        if drafter.config.is_router_trained:
            counts = self._routing or RoutingCounts(depth)
            found |= counts.metrics(accelerator.reduce(counts.flat().to(accelerator.device)).cpu())
        self._clear()
        if self.args.eval_prompts:
            _check_whole(accelerator)
            prompts = held_out_prompts(dataset, self.target, self.args)
            own = prompts[accelerator.process_index :: accelerator.num_processes]
            counts = counted(decoded_rounds(drafter, self.target, own, _answers(self.args)))
            found["acceptance_length"] = acceptance_length(counts)
            found |= acceptance_by_depth(counts)
        return found


def check_best_metric(args: CoralTrainingArguments, dataset: Any, drafter: CoralDrafter) -> None:
    """That the metric which chooses the best checkpoint is one that evaluations will give.

    Args:
        dataset: that is evaluated, or several by name.
        drafter: as it is before the training.

    Raises:
        ValueError: naming the metrics that there will be.
    """
    if args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    names = ["loss", "simulated_acceptance_length"]
    depths = range(1, tree_depth(drafter) + 1)
    if args.eval_prompts:
        names += ["acceptance_length", *(f"acceptance_depth_{depth}" for depth in depths)]
    if drafter.config.is_router_trained or args.stage in ("router", "joint"):
        names += [f"{name}_depth_{depth}" for depth in depths for name in ROUTING]
    if isinstance(dataset, dict):
        names = [f"{part}_{name}" for part in dataset for name in names]
    wanted = args.metric_for_best_model.removeprefix("eval_")
    if wanted not in names and OURS.fullmatch(wanted):
        raise ValueError(
            f"`metric_for_best_model` is {args.metric_for_best_model!r}, which no evaluation will"
            f" give with `eval_prompts` {args.eval_prompts} and these datasets; use one of {names}."
        )


def tree_depth(drafter: CoralDrafter) -> int:
    """Levels of a drafter's own trees; older checkpoints leave them to the defaults."""
    return getattr(drafter.generation_config, "tree_depth", TREE_DEFAULTS["tree_depth"])


def _answers(args: CoralTrainingArguments) -> AnswerSettings:
    return AnswerSettings(
        max_new_tokens=args.eval_max_new_tokens,
        temperature=args.eval_temperature,
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
    )


def _check_whole(accelerator: Accelerator) -> None:
    """Ranks decode different numbers of rounds, so none can wait for another's weights."""
    plugin = accelerator.state.deepspeed_plugin
    if accelerator.distributed_type == "FSDP" or (plugin and plugin.zero_stage == 3):
        raise ValueError(
            "`eval_prompts` needs the whole drafter in every process, but its weights are sharded"
            f" ({accelerator.distributed_type}); pass eval_prompts=0, or train with plain data"
            " parallelism."
        )


def held_out_prompts(
    dataset: Iterable, target: Target, args: CoralTrainingArguments
) -> list[list[int]]:
    """Token ids of up to `eval_prompts` prompts, from rows spread evenly over a dataset.

    A prompt is what precedes the first trained token, and of plain text, of which everything is
    trained, its first `eval_prompt_length` tokens. Rows that hold no more than their prompt, or
    that leave the target no room to answer, are passed over. A stream gives its first rows.
    """
    rows = [first_document(row) for row in _spread(dataset, args.eval_prompts)]
    limit = max_positions(text_config(target.model))
    room = float("inf") if limit is None else limit - args.eval_max_new_tokens
    found = [(prompt_of(row, args.eval_prompt_length), len(row["input_ids"])) for row in rows]
    prompts = [prompt for prompt, length in found if len(prompt) < length and len(prompt) <= room]
    if not prompts:
        raise ValueError(
            f"None of {len(rows)} rows has a prompt of at most {room} tokens and something after"
            " it; lower `eval_max_new_tokens` or `eval_prompt_length`, or pass eval_prompts=0."
        )
    return prompts


def _spread(dataset: Any, count: int) -> Iterator[Any]:
    if isinstance(dataset, IterableDataset):
        return islice(dataset, count)
    number = min(count, len(dataset))
    return (dataset[index * len(dataset) // number] for index in range(number))


def first_document(row: Any) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a row, of a packed one those of its first document."""
    ids, labels = (torch.as_tensor(row[name]).tolist() for name in ("input_ids", "labels"))
    positions = list(row.get("position_ids", range(len(ids))))
    end = next((i for i in range(1, len(ids)) if positions[i] == 0), len(ids))
    return {"input_ids": ids[:end], "labels": labels[:end]}


def prompt_of(row: Any, text_length: int) -> list[int]:
    """The prompt of a row of `input_ids` and `labels`; `text_length` tokens of a plain text."""
    ids, labels = row["input_ids"], row["labels"]
    first = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    # of everything the third token is the first that can be trained
    return ids[: text_length if first <= 2 else first]


def count_rounds(rounds: list[int], depth: int) -> Tensor:
    """(depth + 2,): at n the rounds that emitted n tokens, of trees of up to `depth` levels."""
    return torch.bincount(torch.tensor(rounds, dtype=torch.long), minlength=depth + 2)


def acceptance_length(counts: Tensor) -> float:
    """τ, tokens per round, of `count_rounds`; 0 if there was no round."""
    tokens = (counts * torch.arange(len(counts))).sum()
    return float(tokens / counts.sum().clamp(min=1))


def acceptance_by_depth(counts: Tensor) -> dict[str, float]:
    """By depth, how many of the rounds that came so far accept one level more.

    tokens of a round   1   2   3   4
    counts              5   2   2   1     depth 1: 5 of 10, depth 2: 3 of 5, depth 3: 1 of 3
    """
    # reached[d]: rounds that accepted d levels or more, each with one more token
    reached = counts.flip(0).cumsum(0).flip(0)[1:].tolist()
    return {
        f"acceptance_depth_{depth}": reached[depth] / reached[depth - 1]
        for depth in range(1, len(reached))
        if reached[depth - 1]
    }
