"""Triton kernel for the logits of active groups: rows of the weight are read where they lie.

In and out: as for `plain_group_logits`. One launch whose shape depends on no value, so nothing
waits for the host and a CUDA graph can capture it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program's share. Features are few, so the tokens alone must keep every multiprocessor reading;
# four stages of 64 rows are 96 KiB, which all but the oldest GPUs have.
TOKENS = 32
ROW_BYTES = 256  # of a row of the weight, read at a time
MIN_NODES, MAX_NODES = 16, 64  # `tl.dot` takes no fewer
NUM_STAGES = 4


def fused_group_logits(
    features: Tensor,
    weight: Tensor,
    active: Tensor,
    size: int,
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Compute the logits (batch, nodes, slots, size) of `plain_group_logits` in one launch."""
    batch, nodes, hidden = features.shape
    slots = active.shape[-1]
    logits = features.new_empty((batch, nodes, slots, size), dtype=torch.float32)
    block_nodes = min(max(triton.next_power_of_2(nodes), MIN_NODES), MAX_NODES)
    grid = (batch * slots, triton.cdiv(size, TOKENS), triton.cdiv(nodes, block_nodes))
    if logits.numel():
        # Triton launches on the current GPU, which need not be the tensors'
        with torch.cuda.device_of(logits):
            tensors = (features.contiguous(), weight, bias, active.contiguous(), order)
            sizes = (nodes, hidden, len(weight), slots, size, weight.stride(0))
            given = [part is not None for part in (bias, order)]
            blocks = (block_nodes, TOKENS, ROW_BYTES // weight.element_size())
            # sums differ in the last bit without fusion, whose default changes
            options = {"num_stages": NUM_STAGES, "enable_fp_fusion": True}
            _group_logits[grid](*tensors, logits, *sizes, *given, *blocks, **options)
    return logits


@triton.jit
def _group_logits(
    features,  # (batch, nodes, hidden)
    weight,  # (vocab, hidden), rows `weight_stride` apart
    bias,  # (vocab,)
    active,  # (batch, slots), int64
    order,  # (vocab,), int64
    logits,  # (batch, nodes, slots, size)
    nodes,
    hidden,
    vocab,
    slots,
    size,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    NODES: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program computes TOKENS tokens of one slot of one sequence, for NODES of its nodes."""
    sequence = (tl.program_id(0) // slots).to(tl.int64)  # vocab × hidden may exceed 32 bits
    slot = tl.program_id(0) % slots
    group = tl.load(active + tl.program_id(0))
    node = tl.program_id(2) * NODES + tl.arange(0, NODES)  # (NODES,)
    within = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)  # (TOKENS,)
    place = group * size + within
    is_node = node < nodes
    is_token = (within < size) & (place >= 0) & (place < vocab)  # place < 0: an unused slot
    token = tl.load(order + place, mask=is_token, other=0) if HAS_ORDER else place

    feature_start = features + (sequence * nodes + node) * hidden
    weight_start = weight + token * weight_stride
    total = tl.zeros((NODES, TOKENS), tl.float32)
    for start in range(0, tl.where(group >= 0, hidden, 0), CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        is_channel = channel < hidden
        has_x, has_w = is_node[:, None] & is_channel, is_token & is_channel[:, None]
        x = tl.load(feature_start[:, None] + channel, mask=has_x, other=0.0)  # (NODES, CHANNELS)
        w = tl.load(weight_start + channel[:, None], mask=has_w, other=0.0)  # (CHANNELS, TOKENS)
        total = tl.dot(x, w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + token, mask=is_token, other=0.0).to(tl.float32)

    place_out = ((sequence * nodes + node[:, None]) * slots + slot) * size + within
    total = tl.where(is_token, total, float("-inf"))
    tl.store(logits + place_out, total, mask=is_node[:, None] & (within < size))
