"""Rows of a run, as its plan needs them: how many, how long, and the largest batch.

In: rows of the trainer. Out: a RowSizes.
"""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..arguments import CoralTrainingArguments
from ..data import CoralCollator
from ..features import CachedFeatures
from ..features.writer import row_lengths


class RowSizes(NamedTuple):
    """The rows of a run."""

    rows: Any  # a `datasets.Dataset` of token ids and labels, or `CachedFeatures`
    lengths: np.ndarray  # (rows,), tokens of each
    is_grouped: bool  # whether rows of like lengths come together

    @property
    def num_tokens(self) -> int:
        """The tokens of all rows."""
        return int(self.lengths.sum())

    def largest_batch(self, batch_size: int) -> dict[str, Tensor]:
        """Collate the batch that takes most memory: the longest row, among others as they come.

        Returns:
            (batch, length) each, `features` (batch, length, hidden) of a cache.
        """
        order = np.argsort(-self.lengths, kind="stable")
        others = order[1:]
        if not self.is_grouped and len(others):  # of all lengths
            places = (np.arange(batch_size - 1) + 0.5) / max(batch_size - 1, 1) * len(others)
            others = others[places.astype(int)]
        chosen = [order[0], *others[: batch_size - 1]]
        return CoralCollator()([self.rows[int(index)] for index in chosen])


def row_sizes(rows: Any, args: CoralTrainingArguments) -> RowSizes:
    """Read the sizes of a trainer's rows."""
    is_cache = isinstance(rows, CachedFeatures)
    lengths = np.array(rows.lengths) if is_cache else row_lengths(rows)
    is_grouped = args.train_sampling_strategy == "group_by_length"
    return RowSizes(rows if is_cache else rows.with_format(None), lengths, is_grouped)


def num_steps(num_rows: int, args: CoralTrainingArguments) -> int:
    """Count the optimizer steps of a run, as `Trainer` does."""
    if args.max_steps > 0:
        return args.max_steps
    batches = -(-num_rows // (args.per_device_train_batch_size * args.world_size))
    each = -(-batches // args.gradient_accumulation_steps)
    return int(np.ceil(args.num_train_epochs * each))


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
