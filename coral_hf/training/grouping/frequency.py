"""Expected counts of the tokens that a target generates.

In: a target, training rows. Out: the counts, and the tokens sorted by them.
"""

from typing import Any

import torch
from torch import Tensor

from ...target import Target
from .positions import read_top_k

# on a target of 32k tokens 10k positions made groups as good as 100k did
MAX_TOKENS = 50_000


def token_counts(
    target: Target,
    rows: Any,
    max_tokens: int = MAX_TOKENS,
    num_tokens: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Sum the target's probabilities, (positions, vocab), over trained positions.

    A position counts for all likely tokens, not for the one in the row, so fewer positions suffice,
    tokens that are in no row are ranked too, and the rows need not be written by the target.

    Args:
        target: the target.
        rows: as the trainer has them: token ids and labels, or `CachedFeatures`.
        max_tokens: trained positions that are read at most.
        num_tokens: of the tokenizer; ids from there on, which pad the vocabulary, count nothing.
        seed: of the order in which rows are read.

    Returns:
        (vocab,), fp64, on the CPU.

    Raises:
        ValueError: if there are no rows, or if none of their tokens is trained.
    """
    counts = read_top_k(target, rows, max_tokens, seed, top_k=1).counts
    counts[num_tokens or len(counts) :] = 0
    return counts


def most_frequent_first(counts: Tensor) -> Tensor:
    """Sort the tokens by their counts; equal counts keep the order of the ids.

    The first of them make a frequency head, slices of them a grouping.

    Args:
        counts: (vocab,), of `token_counts`.

    Returns:
        (vocab,), token ids.
    """
    if counts.dim() != 1 or not torch.isfinite(counts).all():
        raise ValueError(
            f"`counts` has shape {tuple(counts.shape)} or holds values that are not finite;"
            " expected one number for each token, as `token_counts` returns them."
        )
    return counts.argsort(descending=True, stable=True)
