"""Logits of the active groups of an LM head, without reading the rest of it.

In: features, the head's weight, and the groups that each sequence or each node reads. Out: raw
logits (batch, nodes, slots, size). A group is `size` consecutive rows of the weight, or of `order`,
which says where each row is. On CUDA one Triton kernel reads the weight in place; the plain form
beside it says what the kernel computes and runs everywhere else. Both are one operator of a traced
graph, whose shape depends on no value. Copying the active rows first, which torch's own operators
would do, takes up to six times as long on a CPU.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .quantized import QuantizedRows, multiply, round_rows

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # which it sums in fp32


def group_logits(
    features: Tensor,
    weight: Tensor | QuantizedRows,
    active: Tensor,
    size: int,
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Compute the logits of the tokens in the active groups: feature · weight row + bias.

    Args:
        features: (batch, nodes, hidden), in the weight's dtype; any where it is quantized.
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
    if active.shape[:2] not in ((batch, 1), (batch, nodes)):
        raise ValueError(
            f"`active` is {tuple(active.shape)}, but the features are of {batch} sequences of"
            f" {nodes} nodes; use ({batch}, 1, slots) or ({batch}, {nodes}, slots)."
        )
    if active.shape[1] != 1:
        # a node with groups of its own is a sequence of one node
        features, active = features.flatten(0, 1)[:, None], active.flatten(0, 1)[:, None]
    scales = None
    if isinstance(weight, QuantizedRows):
        weight, scales = weight
    tensors = (features, weight) if bias is None else (features, weight, bias)
    # the operator has no gradient
    is_plain = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    read = plain_group_logits if is_plain else _group_logits
    return read(features, weight, active, size, bias, order, scales).view(batch, nodes, -1, size)


@torch.library.custom_op(
    "coral_hf::group_logits",
    mutates_args=(),
    schema="(Tensor features, Tensor weight, Tensor active, int size, Tensor? bias, Tensor? order,"
    " Tensor? scales) -> Tensor",
)
def _group_logits(features, weight, active, size, bias, order, scales):
    """See `plain_group_logits`, whose arguments these are: (batch, nodes, slots, size)."""
    is_fusible = has_kernel(weight if scales is None else features) and weight.stride(-1) == 1
    kernel = _kernel() if is_fusible else None
    return (kernel or plain_group_logits)(features, weight, active, size, bias, order, scales)


@_group_logits.register_fake
def _(features, weight, active, size, bias, order, scales):  # (batch, nodes, slots, size), as above
    shape = (*features.shape[:2], active.shape[-1], size)
    return features.new_empty(shape, dtype=torch.float32)


def plain_group_logits(
    features: Tensor,
    weight: Tensor,
    active: Tensor,
    size: int,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Compute `group_logits` group by group, for groups (batch, 1, slots) that nodes share.

    Waits for the values of `active`. A group that several sequences read is read once. `weight` is
    quantized where it has `scales` (vocab,).
    """
    vocab = len(weight if scales is None else scales)
    shape = (*features.shape[:2], active.shape[-1], size)
    logits = features.new_full(shape, float("-inf"), dtype=torch.float32)
    if scales is not None and not features.is_cuda:  # no product there takes groups of any size
        rounded = round_rows(features.flatten(0, 1), weight.dtype)
        values, sizes = (part.unflatten(0, features.shape[:2]) for part in rounded)
    for group, readers in _readers(active).items():
        start, stop = group * size, min((group + 1) * size, vocab)
        if start >= stop:
            continue
        part = slice(start, stop) if order is None else order[start:stop]
        own, own_bias = weight[part], None if bias is None else bias[part]
        # numbers where one sequence reads the group, as views cost less than gathered copies
        rows, slots = readers[0] if len(readers) == 1 else map(list, zip(*readers, strict=True))
        # (*readers, nodes, tokens)
        if scales is None:
            block = F.linear(features[rows], own, own_bias)
        elif features.is_cuda:
            block = F.linear(features[rows], own.to(features.dtype)) * scales[part]
        else:
            block = multiply(
                values[rows].flatten(0, -2), sizes[rows].flatten(), own, scales[part]
            ).unflatten(0, sizes[rows].shape)
        if scales is not None and own_bias is not None:
            block = block + own_bias
        logits[rows, :, slots, : stop - start] = block.float()
    return logits


def _readers(active: Tensor) -> dict[int, list[tuple[int, int]]]:
    """Map each group of `active` (batch, 1, slots) to the (row of the batch, slot) that read it."""
    readers = defaultdict(list)
    for row, slots in enumerate(active[:, 0].tolist()):
        for slot, group in enumerate(slots):
            if group >= 0:
                readers[group].append((row, slot))
    return readers


def has_kernel(weight: Tensor) -> bool:
    """Whether rows of a frozen weight (vocab, hidden) can be read in place in any order."""
    return weight.is_cuda and weight.dtype in KERNEL_DTYPES and _kernel() is not None


@cache
def _kernel() -> Callable[..., Tensor] | None:
    """Import the Triton kernel when it is first needed; None where Triton is not installed.

    It makes (batch, nodes, slots, size) logits, see `group_logits`.
    """
    try:
        from .group_kernel import fused_group_logits
    except ImportError:
        return None
    return fused_group_logits
