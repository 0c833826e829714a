"""Orders of the vocabulary, whose equal slices are groups, and expected counts of tokens.

In: a target and its training rows. Out: (vocab,) token ids, those that pad the vocabulary last; or
how often the target generates each token.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as arrow
import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.nn import functional as F

from ...heads.router import Groups
from ...heads.settings import GROUPINGS
from ...target import Target, text_config
from ..data.encoding import IGNORED
from ..features import CachedFeatures
from .clusters import coactivation_groups, kmeans_groups
from .positions import read_top_k

# on a target of 32k tokens 10k positions made groups as good as 100k did
MAX_TOKENS = 50_000


def group_order(
    grouping: str,
    target: Target,
    rows: Any,
    num_groups: int,
    seed: int = 0,
    num_tokens: int | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Tensor | None:
    """Order the vocabulary so that its slices are the groups of a router.

    The same arguments make the same order. In a distributed run all processes call this, and get
    the first one's.

    Args:
        grouping: "contiguous", "kmeans", "frequency" or "coactivation".
        target: the target.
        rows: the training rows, as the trainer has them: token ids and labels, or `CachedFeatures`.
            Only the last two groupings read them.
        num_groups: of the router.
        seed: of the order in which rows are read and of k-means.
        num_tokens: of the tokenizer; ids from there on, which pad the vocabulary, come last.
        max_tokens: trained positions that are read at most.

    Returns:
        (vocab,), token ids on the CPU; None for the ids' own order.

    Raises:
        ValueError: if a grouping needs rows, of training or of the LM head, that cannot be read, or
            if there are more groups than tokens.
    """
    if grouping not in GROUPINGS[:-1]:
        raise ValueError(f"`grouping` is {grouping!r}; use one of {GROUPINGS[:-1]}.")
    vocab_size = text_config(target.model).vocab_size
    num_tokens = vocab_size if num_tokens is None else num_tokens
    if not 1 <= num_groups <= vocab_size:
        raise ValueError(f"`num_groups` is {num_groups}; use 1 to `vocab_size` = {vocab_size}.")
    if grouping == "contiguous":
        return None
    size = Groups(vocab_size, num_groups).size
    sizes = torch.full((-(-num_tokens // size),), size)
    sizes[-1] -= int(sizes.sum()) - num_tokens
    order = _order_of(grouping, target, rows, sizes, seed, max_tokens)
    order = torch.cat([order, torch.arange(num_tokens, vocab_size)])
    # the first process's: devices differ in the last bit
    return broadcast(order.to(PartialState().device)).cpu()


def _order_of(
    grouping: str, target: Target, rows: Any, sizes: Tensor, seed: int, max_tokens: int
) -> Tensor:
    """Order tokens group by group, of shape (tokens,), for `sizes` (groups,)."""
    num_tokens = int(sizes.sum())
    if grouping == "frequency":
        counts = token_counts(target, rows, max_tokens, num_tokens, seed)
        return most_frequent_first(counts[:num_tokens])
    if not target.head.is_readable:
        raise ValueError(
            f"The rows of the target's LM head ({type(target.head.module).__name__}) cannot be"
            " read: it is quantised, offloaded or adapted. Use grouping='frequency' or"
            " 'contiguous', or load the target with an LM head in floating point."
        )
    vectors = target.head.weight[:num_tokens].detach().float().cpu()  # (tokens, hidden)
    groups = kmeans_groups(vectors, sizes, seed)
    if grouping == "coactivation":
        top = read_top_k(target, rows, max_tokens, seed, num_tokens=num_tokens)
        groups = coactivation_groups(top, vectors, groups, sizes)
    return groups.argsort(stable=True)


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
    counts = read_top_k(target, rows, max_tokens, seed, top_k=1, num_tokens=num_tokens).counts
    return F.pad(counts, (0, text_config(target.model).vocab_size - len(counts)))


def label_counts(rows: Any, vocab_size: int) -> Tensor:
    """Count the trained tokens of rows, of shape (vocab,), on the CPU.

    Args:
        rows: as the trainer has them: token ids and labels, or `CachedFeatures`.

    Raises:
        ValueError: for a stream, and if none of their tokens is trained.
    """
    if isinstance(rows, IterableDataset):
        raise ValueError(
            "A draft vocabulary is counted from the training rows before training, but"
            " `train_dataset` is a stream. Set the tokens of the drafter first, such as those of a"
            " part of the stream: drafter.set_draft_vocabulary(tokens)."
        )
    counts = np.zeros(vocab_size, dtype=np.int64)
    for labels in _columns(rows, "labels"):
        counts += np.bincount(labels[labels != IGNORED], minlength=vocab_size)
    if not counts.any():
        raise ValueError("`rows` have no trained token; check the chat template and the data.")
    return torch.from_numpy(counts)


def _columns(rows: Any, name: str) -> Iterator[np.ndarray]:
    """Yield a column of rows in parts, (tokens,) each."""
    if isinstance(rows, CachedFeatures):
        yield from (part.numpy() for part in rows.column(name))
    elif isinstance(rows, Dataset):
        for batch in rows.with_format("arrow").select_columns(name).iter(batch_size=1000):
            yield np.asarray(arrow.list_flatten(batch[name]))
    else:
        yield from (np.asarray(row[name]) for row in rows)


def most_frequent_first(counts: Tensor) -> Tensor:
    """Sort the tokens by their counts; equal counts keep the order of the ids.

    The first of them make a frequency head, slices of them a grouping.

    Args:
        counts: of shape (vocab,), of `token_counts` or `label_counts`.

    Returns:
        (vocab,), token ids.
    """
    if not torch.isfinite(counts).all():
        raise ValueError("`counts` are not finite; expected those that `token_counts` returns.")
    return counts.argsort(descending=True, stable=True)
