"""Orders of the vocabulary, whose equal slices are groups.

In: a target and its training rows. Out: (vocab,) token ids, those that pad the vocabulary last.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor

from ...heads.groups import Groups, check_order
from ...target import Target, text_config
from .clusters import coactivation_groups, kmeans_groups
from .frequency import MAX_TOKENS, most_frequent_first, token_counts
from .positions import read_top_k


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
    if grouping not in ("contiguous", *ORDERS):
        raise ValueError(f"`grouping` is {grouping!r}; use 'contiguous' or one of {[*ORDERS]}.")
    vocab_size = text_config(target.model).vocab_size
    num_tokens = vocab_size if num_tokens is None else num_tokens
    for name, value in (("num_groups", num_groups), ("num_tokens", num_tokens)):
        if not 1 <= value <= vocab_size:
            raise ValueError(
                f"`{name}` is {value}; use a value from 1 to the target's `vocab_size` ="
                f" {vocab_size}."
            )
    if grouping == "contiguous":
        return None
    size = Groups(vocab_size, num_groups).size
    sizes = torch.full((-(-num_tokens // size),), size)
    sizes[-1] -= int(sizes.sum()) - num_tokens
    order = ORDERS[grouping](target, rows, sizes, seed, max_tokens)
    order = _broadcast(torch.cat([order, torch.arange(num_tokens, vocab_size)]))
    check_order(order, vocab_size)
    return order


def _frequency(target: Target, rows: Any, sizes: Tensor, seed: int, max_tokens: int) -> Tensor:
    """Order tokens group by group, of shape (tokens,), for `sizes` (groups,)."""
    counts = token_counts(target, rows, max_tokens, seed=seed)
    return most_frequent_first(counts[: int(sizes.sum())])


def _kmeans(target: Target, rows: Any, sizes: Tensor, seed: int, max_tokens: int) -> Tensor:
    """Order tokens group by group, of shape (tokens,), for `sizes` (groups,)."""
    weight = _head_rows(target, int(sizes.sum()))
    return kmeans_groups(weight, sizes, seed).argsort(stable=True)


def _coactivation(target: Target, rows: Any, sizes: Tensor, seed: int, max_tokens: int) -> Tensor:
    """Order tokens group by group, of shape (tokens,), for `sizes` (groups,)."""
    weight = _head_rows(target, int(sizes.sum()))
    top = read_top_k(target, rows, max_tokens, seed).below(len(weight))
    groups = kmeans_groups(weight, sizes, seed)
    return coactivation_groups(top, weight, groups, sizes).argsort(stable=True)


# (target, rows, sizes (groups,), seed, max_tokens) → (tokens,) ids
Order = Callable[[Target, Any, Tensor, int, int], Tensor]
ORDERS: dict[str, Order] = {
    "kmeans": _kmeans,
    "frequency": _frequency,
    "coactivation": _coactivation,
}


def _head_rows(target: Target, num_tokens: int) -> Tensor:
    """Copy the first rows of the LM head to fp32 on the CPU, (tokens, hidden)."""
    if not target.head.is_readable:
        raise ValueError(
            f"The rows of the target's LM head ({type(target.head.module).__name__}) cannot be"
            " read: it is quantised, offloaded or adapted. Use grouping='frequency' or"
            " 'contiguous', or load the target with an LM head in floating point."
        )
    return target.head.weight[:num_tokens].detach().float().cpu()


def _broadcast(order: Tensor) -> Tensor:
    """Send the first process's order, of shape (vocab,), to all: devices differ in the last bit."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return order
    return broadcast(order.to(PartialState().device)).cpu()
