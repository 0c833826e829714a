"""Acceptance length of a drafter in training: tokens per target pass, decoded and replayed.

In: held-out rows, and what the unroll predicts for them. Out: metrics by name, defined in
`docs/use/evaluation.md`. Decoded: the target answers prompts with the drafter, by the tree decoding
of `generate`. Simulated: chain decoding replayed over the rows' own text, see `replay.py`. Of a
router also the recall of its active groups, by depth: each position reads the groups that it wants
itself, so this is the router alone, without what a tree's rows share.
"""

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from ...decoding.settings import TREE_DEFAULTS
from ...drafters.model import Drafter
from ...heads.router import Routing
from ...lm_head import LMHead
from ...measure.calls import decoded_rounds
from ...measure.prompts import room_for_prompt
from ...target import Target
from ..arguments import CoralTrainingArguments
from ..data.encoding import IGNORED
from ..steps import Trained, TrainingStep, Unrolled
from .replay import replayed_rounds

CHUNK = 128  # positions whose logits are held at a time
TOP = 10  # of the drafter's own choices
ROUTING = ("router_top_1_recall", f"router_top_{TOP}_recall", "router_mass")


class Evaluation:
    """The acceptance metrics of one evaluation.

    Args:
        step: of the trainer.
        drafter: without wrappers.
        target: of the drafter.
        args: of the trainer.
    """

    def __init__(
        self, step: TrainingStep, drafter: Drafter, target: Target, args: CoralTrainingArguments
    ):
        self._step, self._drafter, self._target, self._args = step, drafter, target, args
        self._choose = partial(step.choices, drafter)
        self._has_router = "router" in step.stages and drafter.config.is_router_trained
        self.depth = tree_depth(drafter)  # steps of the unroll that are counted
        self._replayed: list[int] = []  # tokens of each round
        self._held = torch.zeros(self.depth, len(ROUTING) + 1, dtype=torch.float64)

    def add(self, unrolled: Unrolled) -> None:
        """Count a batch: replay chain decoding, and compare the router's groups."""
        unrolled = unrolled.first(self.depth)
        self._replayed += replayed_rounds(self._choose, self._target, unrolled)
        if self._has_router:
            self._held += routing_sums(self._step, self._drafter, unrolled.trained())

    def metrics(self, dataset: Iterable, accelerator: Accelerator) -> dict[str, float]:
        """Compute the metrics, the same in every process; each decodes its share of the prompts.

        Args:
            dataset: the rows that were evaluated.
            accelerator: of the trainer.
        """

        def summed(counts: Tensor) -> Tensor:  # any shape
            return accelerator.reduce(counts.to(accelerator.device)).cpu()

        replayed = summed(count_rounds(self._replayed, self.depth))
        found = {"simulated_acceptance_length": acceptance_length(replayed)}
        if self._has_router:
            found |= routing_metrics(summed(self._held))
        if self._args.eval_prompts:
            counts = summed(self._decode(dataset, accelerator))
            found["acceptance_length"] = acceptance_length(counts)
            found |= acceptance_by_depth(counts)
        return found

    def _decode(self, dataset: Iterable, accelerator: Accelerator) -> Tensor:
        """Count rounds of this process's prompts: shape (depth + 2,), see `count_rounds`."""
        args, plugin = self._args, accelerator.state.deepspeed_plugin
        if accelerator.distributed_type == "FSDP" or (plugin and plugin.zero_stage == 3):
            # processes decode different numbers of rounds: none can wait for another's weights
            raise ValueError(
                f"`eval_prompts` needs a whole drafter, but {accelerator.distributed_type} shards"
                " its weights; pass eval_prompts=0, or train with plain data parallelism."
            )
        sizes = args.eval_prompts, args.eval_max_new_tokens, args.eval_prompt_length
        prompts = held_out_prompts(dataset, self._target, *sizes)
        own = prompts[accelerator.process_index :: accelerator.num_processes]
        settings = args.eval_max_new_tokens, args.eval_temperature, args.per_device_eval_batch_size
        rounds = decoded_rounds(self._drafter, self._target, own, *settings, args.seed)
        return count_rounds(rounds, self.depth)


def tree_depth(drafter: Drafter) -> int:
    """Return the levels of a drafter's own trees; older checkpoints leave them to the defaults."""
    return getattr(drafter.generation_config, "tree_depth", TREE_DEFAULTS["tree_depth"])


def held_out_prompts(
    dataset: Any, target: Target, number: int, max_new_tokens: int, text_length: int
) -> list[list[int]]:
    """Collect token ids of up to `number` prompts, from rows spread evenly over a dataset.

    A prompt is what precedes the first trained token, and of plain text, of which everything is
    trained, its first `text_length` tokens. Rows that hold no more than their prompt, or that leave
    the target no room for `max_new_tokens`, are skipped. A stream gives its first rows.
    """
    if isinstance(dataset, IterableDataset):
        rows = [first_document(row) for row in islice(dataset, number)]
    else:
        number = min(number, len(dataset))
        places = (index * len(dataset) // number for index in range(number))
        rows = [first_document(dataset[place]) for place in places]
    room = room_for_prompt(target.model, max_new_tokens)
    found = [(prompt_of(row, text_length), len(row["input_ids"])) for row in rows]
    prompts = [prompt for prompt, length in found if len(prompt) < length and len(prompt) <= room]
    if not prompts:
        raise ValueError(
            f"None of {len(rows)} rows has a prompt of at most {room} tokens and something after"
            " it; lower `eval_max_new_tokens` or `eval_prompt_length`, or pass eval_prompts=0."
        )
    return prompts


def first_document(row: Any) -> dict[str, list[int]]:
    """Cut `input_ids` and `labels` of a row, of shape (length,), after its first part."""
    ids, labels = (torch.as_tensor(row[name]).tolist() for name in ("input_ids", "labels"))
    positions = list(row.get("position_ids", range(len(ids))))
    end = next((i for i in range(1, len(ids)) if positions[i] != i), len(ids))
    return {"input_ids": ids[:end], "labels": labels[:end]}


def prompt_of(row: Any, text_length: int) -> list[int]:
    """Return the prompt of a row with `labels`; of plain text its first `text_length` tokens."""
    ids, labels = row["input_ids"], row["labels"]
    first = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    # of everything the third token is the first that can be trained
    return ids[: text_length if first <= 2 else first]


def count_rounds(rounds: list[int], depth: int) -> Tensor:
    """Count rounds by their tokens: shape (depth + 2,), at n those that emitted n tokens.

    `depth` is that of the deepest tree.
    """
    return torch.bincount(torch.tensor(rounds, dtype=torch.long), minlength=depth + 2)


def acceptance_length(counts: Tensor) -> float:
    """Compute τ, tokens per round, of counts of shape (depth + 2,); 0 if there was no round."""
    tokens = (counts * torch.arange(len(counts))).sum()
    return float(tokens / counts.sum().clamp(min=1))


def acceptance_by_depth(counts: Tensor) -> dict[str, float]:
    """Compute the share of the rounds that reach a depth and accept one level more, by depth.

    `counts` has shape (depth + 2,), see `count_rounds`.

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


@torch.no_grad()
def routing_sums(step: TrainingStep, drafter: Any, trained: Trained) -> Tensor:
    """Sum over positions what the active groups hold, by step: (steps, names + 1), on the CPU.

    The last column counts the positions.

    Args:
        step: of the trainer.
        drafter: with a router.
        trained: predictions (steps, positions, hidden) and features (positions, hidden).
    """
    sums = torch.zeros(len(trained.predicted), len(ROUTING) + 1, dtype=torch.float64)
    parts = zip(trained.predicted.split(CHUNK, dim=1), trained.target.split(CHUNK), strict=True)
    for guessed, true in parts:
        probs = step.target.head.logits(true).float().softmax(-1)  # (positions, vocab)
        read = [step.read_head(drafter, one.to(drafter.dtype)) for one in guessed]
        sums += torch.stack([_held(drafter, *one, probs) for one in read]).cpu()
    return sums


def routing_metrics(sums: Tensor) -> dict[str, float]:
    """Compute shares by name and depth of `routing_sums`, (steps, names + 1)."""
    shares = (sums[:, :-1] / sums[:, -1:].clamp(min=1)).tolist()
    return {
        f"{name}_depth_{depth}": share
        for depth, step in enumerate(shares, start=1)
        for name, share in zip(ROUTING, step, strict=True)
    }


def _held(drafter: Any, features: Tensor, head: LMHead, probs: Tensor) -> Tensor:
    """Sum over positions what the active groups of one step hold: (names + 1,).

    Args:
        features: (positions, hidden), what the router reads.
        head: that the drafter reads.
        probs: (positions, vocab), the target's.
    """
    assert drafter.heads.router is not None, "only counted for drafters with a router"
    groups = drafter.heads.router.groups_of(drafter.config.vocab_size)
    log_mass = drafter.heads.router(features)[None, :, : groups.filled]
    routing = Routing.from_config(drafter.config).by_node()
    chosen = routing.choose(log_mass, log_mass.new_zeros(log_mass.shape[:2]))[0]
    # (positions, groups + 1), the last for slots that read nothing: UNUSED is -1
    is_active = probs.new_zeros(len(probs), groups.num_groups + 1)
    is_active.scatter_(1, chosen % is_active.shape[1], 1.0)
    is_read = is_active[:, groups.group_of().to(probs.device)]
    # (positions, vocab) of the target, which may have other tokens by now
    is_read = F.pad(is_read, (0, probs.shape[-1] - groups.vocab_size))
    own = head.logits(features).topk(min(TOP, probs.shape[-1])).indices
    first = is_read.gather(1, probs.argmax(-1, keepdim=True))
    best = is_read.gather(1, own).mean(1)
    held = [part.double().sum() for part in (first, best, is_read * probs)]
    return torch.stack([*held, held[0].new_tensor(len(probs))])
