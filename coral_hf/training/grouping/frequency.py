"""How often a target writes each token.

In: a target, training rows. Out: expected counts, and the tokens in their order.
"""

from typing import Any

import torch
from torch import Tensor

from ...target import Target
from .positions import read_positions

# on a target of 32k tokens 10k positions made groups as good as 100k did
MAX_TOKENS = 50_000


def token_counts(
    target: Target,
    rows: Any,
    max_tokens: int = MAX_TOKENS,
    num_tokens: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Expected counts of all tokens: the target's probabilities, summed over trained positions.

    A position counts for all that the target might say there, not for the one token of the text, so
    fewer positions suffice, tokens that are in no row have an order too, and the rows need not have
    been written by the target.

    Args:
        rows: as the trainer has them: token ids and labels, or `CachedFeatures`.
        max_tokens: trained positions that are read at most.
        num_tokens: of the tokenizer; ids from there on, which pad the vocabulary, count nothing.

    Returns:
        (vocab,), fp64, on the CPU.

    Raises:
        ValueError: if there are no rows, or if none of their tokens is trained.
    """
    counts = read_positions(target, rows, max_tokens, seed, top_k=1).counts
    counts[num_tokens or len(counts) :] = 0
    return counts


def most_frequent_first(counts: Tensor) -> Tensor:
    """The tokens by their counts, (vocab,) → (vocab,) ids; equal counts in the order of the ids.

    The first of them make a frequency head, slices of them a grouping.
    """
    if counts.dim() != 1 or not torch.isfinite(counts).all():
        raise ValueError(
            f"`counts` has shape {tuple(counts.shape)} or holds values that are not finite;"
            " expected one number for each token, as `token_counts` returns them."
        )
    return counts.argsort(descending=True, stable=True)
