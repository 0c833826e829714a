"""Logits of an LM head in eight bits, or of active groups of its rows, and the best of them.

Eight bits: a private copy of the head's weight (vocab, hidden) in int8, with one scale a row;
features are rounded row by row in the same way. A rounded logit changes what is proposed and never
what is verified.

Groups: from features and the groups that each sequence or each node reads to raw logits (batch,
nodes, slots, size), without reading the rest of the head. A group is `size` consecutive rows of the
weight, or of `order`, which says where each row is. On CUDA one Triton kernel reads the weight in
place; the plain form beside it says what the kernel computes and runs everywhere else. Both are one
operator of a traced graph, whose shape depends on no value. Copying the active rows first, which
torch's own operators would do, takes up to six times as long on a CPU.

Ranking: no softmax over all logits and no top-k over them is stored. The best tokens lie in the
`top_k` blocks of the largest maxima, and the rest of the softmax is one sum.
"""

import math
from collections import defaultdict
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 16  # of both sizes of a weight, for the products on CUDA
LEAST_FEATURES = 17  # that the product takes on CUDA
DEVICES = ("cpu", "cuda")  # which have the products
BLOCK = 128  # logits whose largest one stands for them
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # which it sums in fp32


class QuantizedRows(NamedTuple):
    """Rows in eight bits; rows and channels of zeros fill them up to multiples of `ALIGNMENT`."""

    values: Tensor  # (padded rows, padded hidden), int8
    scales: Tensor  # (rows,), fp32: a row is its values × its scale


@torch.no_grad()
def quantize(weight: Tensor) -> QuantizedRows:
    """Round the rows of a weight (rows, hidden)."""
    rows, hidden = weight.shape
    padding = (0, -hidden % ALIGNMENT)
    parts = [round_rows(F.pad(part, padding)) for part in weight.split(8192)]
    values, scales = map(torch.cat, zip(*parts, strict=True))
    return QuantizedRows(F.pad(values, (0, 0, 0, -rows % ALIGNMENT)), scales)


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows (rows, hidden) symmetrically: int8 (rows, hidden), scales (rows,) in fp32."""
    rows = rows.float()
    scales = (rows.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows / scales[:, None]).round().to(torch.int8), scales


def quantized_logits(features: Tensor, rows: QuantizedRows) -> Tensor:
    """Multiply features (*batch, hidden), rounded too, with rows: (*batch, rows), in fp32."""
    values, scales = round_rows(features.flatten(0, -2))
    count, hidden = values.shape
    missing = max(LEAST_FEATURES - count, 0) if values.is_cuda else 0
    values = F.pad(values, (0, rows.values.shape[1] - hidden, 0, missing))
    product = torch._int_mm(values, rows.values.T)[:count, : len(rows.scales)]
    return (product * rows.scales).mul_(scales[:, None]).unflatten(0, features.shape[:-1])


def group_logits(
    features: Tensor,
    weight: Tensor,
    active: Tensor,
    size: int,
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Compute the logits of the tokens in the active groups: feature · weight row + bias.

    It has no gradient.

    Args:
        features: (batch, nodes, hidden), in the weight's dtype.
        weight: (vocab, hidden).
        active: (batch, 1, slots), groups that all nodes of a sequence read, or
            (batch, nodes, slots), groups that each node reads; int64, negative in unused slots.
        size: tokens of a group.
        bias: (vocab,)
        order: (vocab,), int64: place i of group g is row order[g × size + i] of the weight; without
            it row g × size + i. Off CUDA, rows that an order scatters are copied to be read.

    Returns:
        (batch, nodes, slots, size), in fp32; -inf where a slot is unused, and where the last groups
        hold fewer tokens.
    """
    batch, nodes, _ = features.shape
    if active.shape[1] != 1:
        # a node with groups of its own is a sequence of one node
        features, active = features.flatten(0, 1)[:, None], active.flatten(0, 1)[:, None]
    logits = _group_logits(features, weight, active, size, bias, order)
    return logits.view(batch, nodes, -1, size)


@torch.library.custom_op(
    "coral_hf::group_logits",
    mutates_args=(),
    schema="(Tensor features, Tensor weight, Tensor active, int size, Tensor? bias, Tensor? order)"
    " -> Tensor",
)
def _group_logits(features, weight, active, size, bias, order):
    """See `plain_group_logits`, whose arguments these are: (batch, nodes, slots, size)."""
    if not has_kernel(weight) or weight.stride(-1) != 1:
        return plain_group_logits(features, weight, active, size, bias, order)
    from .group_kernel import fused_group_logits

    return fused_group_logits(features, weight, active, size, bias, order)


@_group_logits.register_fake
def _(features, weight, active, size, bias, order):  # (batch, nodes, slots, size), as above
    shape = (*features.shape[:2], active.shape[-1], size)
    return features.new_empty(shape, dtype=torch.float32)


def plain_group_logits(
    features: Tensor,
    weight: Tensor,
    active: Tensor,
    size: int,
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Compute `group_logits` group by group, for groups (batch, 1, slots) that nodes share.

    Waits for the values of `active`. A group that several sequences read is read once.
    """
    shape = (*features.shape[:2], active.shape[-1], size)
    logits = features.new_full(shape, float("-inf"), dtype=torch.float32)
    readers = defaultdict(list)  # of each group, the (row of the batch, slot) that read it
    for row, groups in enumerate(active[:, 0].tolist()):
        for slot, group in enumerate(groups):
            readers[group].append((row, slot))
    for group, places in readers.items():
        start, stop = group * size, min((group + 1) * size, len(weight))
        if group < 0 or start >= stop:
            continue
        part = slice(start, stop) if order is None else order[start:stop]
        # numbers where one sequence reads the group, as views cost less than gathered copies
        rows, slots = places[0] if len(places) == 1 else map(list, zip(*places, strict=True))
        # (*readers, nodes, tokens)
        block = F.linear(features[rows], weight[part], None if bias is None else bias[part])
        logits[rows, :, slots, : stop - start] = block.float()
    return logits


def has_kernel(weight: Tensor) -> bool:
    """Whether rows of a frozen weight (vocab, hidden) can be read in place in any order."""
    return weight.is_cuda and weight.dtype in KERNEL_DTYPES and find_spec("triton") is not None


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
    if read < 2 * BLOCK * top_k:
        return _largest(logits, torch.arange(read, device=logits.device), top_k)
    if missing := -read % BLOCK:
        logits = F.pad(logits, (0, missing), value=float("-inf"))
    highest = logits.unflatten(-1, (-1, BLOCK)).amax(-1)  # (*batch, blocks)
    blocks = _largest(highest, torch.arange(highest.shape[-1], device=logits.device), top_k)
    within = torch.arange(BLOCK, device=logits.device)
    places = (blocks[..., None] * BLOCK + within).flatten(-2)  # (*batch, top_k * BLOCK)
    return _largest(logits.gather(-1, places), places, top_k)


def _largest(values: Tensor, places: Tensor, top_k: int) -> Tensor:
    """Return the places of the largest values, (*batch, some) → (*batch, top_k).

    `values` are in fp32; `places` broadcast to them.
    """
    bits = values.view(torch.int32).long()
    bits ^= (bits >> 63) & 0x7FFFFFFF  # now ordered as the numbers are
    keys = torch.sub(-places, bits, alpha=-(2**32))  # bits · 2³² - place
    return -keys.topk(top_k).values & 0xFFFFFFFF
