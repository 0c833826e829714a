"""Acceptance length of a drafter in training: tokens per target pass, decoded and replayed.

In: held-out rows, and what the unroll predicts for them. Out: metrics by name, defined in
`docs/use/evaluation.md`. Decoded: the target answers prompts with the drafter, by the tree decoding
of `generate`. Simulated: greedy chain decoding replayed over the rows' own text, from one unroll:
step d of it stands where a chain of depth d stands, so that a chain that starts with the root x3 is
the diagonal marked *.

    token                 x0    x1    x2    x3    x4    x5    x6    x7
    label                 -     -     -     x3    x4    x5    x6    x7        trained: 3 … 7
    position t            0     1     2     3     4     5
    a step there predicts x2    x3    x4    x5    x6    x7                    by reading x1 … x6
    step 1                            *                                       x4 after root x3
    step 2                                  *                                 x5 after x4, f̂¹_3
    step 3                                        *                           x6 after x5, f̂²_4

On the target's own greedy text these are the rounds of real chain decoding, one by one. On any
other text a round continues along the text where the target itself would have gone another way.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice, takewhile
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from ...decoding.settings import TREE_DEFAULTS
from ...drafters.model import Drafter
from ...measure.calls import decoded_rounds
from ...measure.prompts import room_for_prompt
from ...target import Target
from ..arguments import CoralTrainingArguments
from ..data.encoding import IGNORED
from ..steps import TrainingStep, Unrolled

CHUNK = 256  # rows of logits held at a time
# a token for each row, (rows, hidden) → (rows,), and the step that predicted it
Choose = Callable[..., Tensor]


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
        self._drafter, self._target, self._args = drafter, target, args
        self._choose = partial(step.choices, drafter)
        self.depth = tree_depth(drafter)  # steps of the unroll that are counted
        self._replayed: list[int] = []  # tokens of each round

    def add(self, unrolled: Unrolled) -> None:
        """Replay chain decoding of a batch."""
        self._replayed += replayed_rounds(self._choose, self._target, unrolled.first(self.depth))

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


def replayed_rounds(choose: Choose, target: Target, unrolled: Unrolled) -> list[int]:
    """Count the tokens that each round of greedy chain decoding would emit, row after row.

    Args:
        choose: the drafter's first choices.
        target: of the drafter.
        unrolled: of as many steps as a chain has levels.
    """
    found = unrolled.trained()
    return rounds_of(agreement(choose, target, found.predicted, found.target), unrolled.labels)


def rounds_of(agreed: Tensor, labels: Tensor) -> list[int]:
    """Count the tokens that each round of a greedy chain would emit, row after row.

    Args:
        agreed: (steps, positions), at trained positions: the first choices of step and target are
            the same.
        labels: (batch, length).
    """
    is_trained = labels != IGNORED
    is_trained[:, :2] = False
    spread = agreed.new_zeros(len(agreed), *is_trained[:, 2:].shape)  # t predicts token t + 2
    spread[:, is_trained[:, 2:]] = agreed
    rows = zip(accepted_chains(spread).tolist(), is_trained.tolist(), strict=True)
    return [tokens for accepted, row in rows for tokens in walk(accepted, row)]


@torch.no_grad()
def agreement(choose: Choose, target: Target, predicted: Tensor, features: Tensor) -> Tensor:
    """Mark where the drafter's first choice is the target's: (steps, positions).

    Args:
        choose, target: see `replayed_rounds`.
        predicted: (steps, positions, hidden).
        features: (positions, hidden), what was to be predicted.
    """
    agreed = []
    for guessed, true in zip(predicted.split(CHUNK, dim=1), features.split(CHUNK), strict=True):
        best = target.head.logits(true).argmax(-1)  # (rows,)
        chosen = [choose(one, step=step) for step, one in enumerate(guessed)]
        agreed.append(torch.stack([one == best for one in chosen]))
    return torch.cat(agreed, dim=1)


def accepted_chains(agreed: Tensor) -> Tensor:
    """Count the accepted guesses of each chain, by the position of its first one.

    Args:
        agreed: (steps, batch, positions).

    Returns:
        (batch, positions): at t the leading agreements of step 1 at t, step 2 at t + 1, …
    """
    # step d moves left by d - 1, so that a chain is a column; what moves in is beyond the text
    columns = [F.pad(one[:, step:], (0, step)) for step, one in enumerate(agreed)]
    return torch.stack(columns).long().cumprod(0).sum(0)


def walk(accepted: list[int], trained: list[bool]) -> Iterator[int]:
    """Count the tokens of each round of a row, from root to root through each trained stretch.

    The first token of a stretch is that of the prompt's pass; the last round ends with the stretch.

        token       x3    x4    x5    x6    x7        a stretch, 3 … 7
        round 1     root  ✓     +                     accepted[2] = 1: emits x4 and one more, x5
        round 2                 root  ✓     ✓         accepted[4] = 3: emits what is left, x6 x7

    Args:
        accepted: by position t of a chain's first guess, which is of token t + 2.
        trained: by token.
    """
    root = 0
    while root < len(trained) - 1:
        if not (trained[root] and trained[root + 1]):
            root += 1
            continue
        emitted = list(takewhile(bool, trained[root + 1 : root + 2 + accepted[root - 1]]))
        yield len(emitted)
        root += len(emitted)
