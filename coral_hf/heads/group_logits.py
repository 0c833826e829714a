"""Logits of the active groups of an LM head, without reading the rest of it.

In: features, the head's weight and the groups that each text or each row reads. Out: raw logits
(texts, rows, slots, size). A group is a run of `size` rows of the weight, or of `order`, which says
where each row is. On CUDA one Triton kernel reads the weight in place; the plain form next to it
says what it computes and serves everywhere else.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that it sums in fp32


def group_logits(
    features: Tensor,
    weight: Tensor,
    active: Tensor,
    size: int,
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Logits of the tokens in the active groups: feature · weight row + bias.

    Args:
        features: (texts, rows, hidden), in the weight's dtype.
        weight: (vocab, hidden).
        active: (texts, 1, slots), groups that all rows of a text read, or (texts, rows, slots),
            groups that each row reads; int64, negative where a slot is unused.
        size: tokens of a group.
        bias: (vocab,)
        order: (vocab,), int64: place i of group g is row order[g × size + i] of the weight; without
            it row g × size + i. Off CUDA, rows that an order scatters are copied to be read.

    Returns:
        (texts, rows, slots, size), in fp32; -inf where a slot is unused and where a group has no
        such token, as the last groups may.
    """
    texts, rows, _ = features.shape
    if active.shape[:2] not in ((texts, 1), (texts, rows)):
        raise ValueError(
            f"`active` is {tuple(active.shape)}, but the features are {texts} texts of {rows} rows;"
            f" use ({texts}, 1, slots) or ({texts}, {rows}, slots)."
        )
    if active.shape[1] != 1:
        # a row with groups of its own is a text of one row
        features, active = features.flatten(0, 1)[:, None], active.flatten(0, 1)[:, None]
    kernel = _kernel() if _is_fusible(features, weight, bias) else None
    read = kernel or plain_group_logits
    return read(features, weight, active, size, bias, order).view(texts, rows, -1, size)


def plain_group_logits(
    features: Tensor,
    weight: Tensor,
    active: Tensor,
    size: int,
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """The same, group by group, for groups that the rows of a text share; reads `active`'s values.

    A group that several texts read is read once.
    """
    shape = (*features.shape[:2], active.shape[-1], size)
    logits = features.new_full(shape, float("-inf"), dtype=torch.float32)
    for group, readers in _readers(active).items():
        start, stop = group * size, min((group + 1) * size, weight.shape[0])
        if start >= stop:
            continue
        part = slice(start, stop) if order is None else order[start:stop]
        # numbers where one text reads the group, as views cost less than gathered copies
        texts, slots = readers[0] if len(readers) == 1 else map(list, zip(*readers, strict=True))
        block = F.linear(features[texts], weight[part], None if bias is None else bias[part])
        logits[texts, :, slots, : stop - start] = block.float()  # (..., rows, tokens)
    return logits


def _readers(active: Tensor) -> dict[int, list[tuple[int, int]]]:
    """Group → the texts that read it, each with its slot; the one wait for the device."""
    readers = defaultdict(list)
    for text, slots in enumerate(active[:, 0].tolist()):
        for slot, group in enumerate(slots):
            if group >= 0:
                readers[group].append((text, slot))
    return readers


def has_kernel(weight: Tensor) -> bool:
    """Whether rows of this weight, which takes no gradient, are read through an order in place."""
    return weight.is_cuda and weight.dtype in KERNEL_DTYPES and _kernel() is not None


@cache
def _kernel() -> Callable[..., Tensor] | None:
    """The Triton kernel, imported when it is first needed; None where Triton is not installed."""
    try:
        from .group_kernel import fused_group_logits
    except ImportError:
        return None
    return fused_group_logits


def _is_fusible(features: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel can do it: on CUDA, in what it sums in fp32, with no gradient to give."""
    needs_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (features, weight, bias)
    )
    is_in_rows = weight.stride(-1) == 1
    return has_kernel(weight) and is_in_rows and not needs_gradient
