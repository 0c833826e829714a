"""Ranking of logits: the best tokens of each row, and how probable they are.

In: logits of what was read, (*batch, read). Out: places and log-probabilities, (*batch, top_k). No
softmax over all logits and no top-k over them is stored: the best tokens lie in the `top_k` blocks
of the largest maxima, and the rest of the softmax is one sum. Shapes depend on no value.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # logits whose largest one stands for them
LOWEST = torch.iinfo(torch.int64).min


class Ranked(NamedTuple):
    """The best logits of each row, best first; of equal ones, the lower place first."""

    places: Tensor  # (*batch, top_k)
    log_probs: Tensor  # (*batch, top_k), of a softmax over all that was read


def rank(logits: Tensor, top_k: int) -> Ranked:
    """Rank logits (*batch, read) in fp32, which are overwritten; `top_k` is at most `read`."""
    places = best_places(logits, top_k)
    best = logits.gather(-1, places)
    highest = best[..., :1]
    # in place, as temporaries of this size cost page faults; exp2 is much faster than exp on a CPU
    powers = logits.sub_(highest).mul_(math.log2(math.e)).exp2_()
    return Ranked(places, best - highest - powers.sum(-1, keepdim=True).log())


def best_places(logits: Tensor, top_k: int) -> Tensor:
    """Find the places of the largest logits, (*batch, read) → (*batch, top_k), as in `Ranked`.

    Blocks are ranked by their maxima as tokens are by their logits, so each of the best tokens is
    in one of the best `top_k` blocks.
    """
    read = logits.shape[-1]
    even = read // BLOCK * BLOCK
    if even < 2 * BLOCK * top_k:
        return _largest(logits, torch.arange(read, device=logits.device), top_k)
    highest = logits[..., :even].unflatten(-1, (-1, BLOCK)).amax(-1)  # (*batch, blocks)
    if even < read:
        highest = torch.cat([highest, logits[..., even:].amax(-1, keepdim=True)], -1)
    blocks = _largest(highest, torch.arange(highest.shape[-1], device=logits.device), top_k)
    within = torch.arange(BLOCK, device=logits.device)
    places = (blocks[..., None] * BLOCK + within).flatten(-2)  # (*batch, top_k * BLOCK)
    if even == read:
        return _largest(logits.gather(-1, places), places, top_k)
    return _largest(logits.gather(-1, places.clamp(max=read - 1)), places, top_k, read)


def _largest(values: Tensor, places: Tensor, top_k: int, stop: int | None = None) -> Tensor:
    """Return the places of the largest values, (*batch, some) → (*batch, top_k).

    Args:
        values: in fp32.
        places: of the values, of a shape that broadcasts to theirs.
        stop: places from here on hold nothing.
    """
    bits = values.view(torch.int32).long()
    bits ^= (bits >> 63) & 0x7FFFFFFF  # now ordered as the numbers are
    keys = torch.sub(-places, bits, alpha=-(2**32))  # bits · 2³² - place
    if stop is not None:
        keys = keys.masked_fill(places >= stop, LOWEST)
    return -keys.topk(top_k).values & 0xFFFFFFFF
