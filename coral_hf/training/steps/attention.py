"""Attention of a step of the unroll: the target's features far back, the drafter's own nearby.

In: queries, keys and values of one document. Out: the attention of each position. A step reuses the
keys and values of the steps before it.

    at the step with `own` of length s = 2, position t attends to

    position                 t-3    t-2    t-1    t
    target                   yes    yes                   all up to t - s
    own, first                             yes            at t - 1 alone
    own, second (newest)                          yes     at t alone
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

KeysValues = tuple[Tensor, Tensor]  # (batch, kv_heads, length, head_dim) each
# query, the target's keys and values, a lag → the attention of each position t to those up to
# t - lag, (batch, heads, length, head_dim), and its normaliser, (batch, heads, length)
FarAttention = Callable[[Tensor, KeysValues, int], tuple[Tensor, Tensor]]


def mixed_attention(query: Tensor, target: KeysValues, own: list[KeysValues]) -> Tensor:
    """Compute attention over the target's features and one position of each later step.

    With s = len(own), position t attends to target positions up to t - s and to the k-th of `own`
    (from 1) at position t - (s - k) (HASS, harmonized context alignment).

    Args:
        query: (batch, heads, length, head_dim).
        target: keys and values of the first step, which read the target's features.
        own: the same of each later step, the newest last.

    Returns:
        (batch, heads, length, head_dim); on a CPU by torch's fused kernel.
    """
    if not own:
        return F.scaled_dot_product_attention(query, *target, is_causal=True, enable_gqa=True)
    if query.device.type != "cpu" or query.shape[2] <= len(own):
        return plain_mixed_attention(query, target, own)
    group = query.shape[1] // target[0].shape[1]
    far = [part.repeat_interleave(group, dim=1) for part in target]
    scores, near_values = _diagonals(query, own, torch.arange(query.shape[2])[None])
    return _MergedAttention.apply(query, *far, scores, *near_values)


def plain_mixed_attention(query: Tensor, target: KeysValues, own: list[KeysValues]) -> Tensor:
    """`mixed_attention`, shapes too, with one mask over all keys: target's, first own, second…"""
    length, steps, group = query.shape[2], len(own), query.shape[1] // target[0].shape[1]
    u = torch.arange(length, device=query.device)
    t = u[:, None]
    near = [u == t - (steps - k) for k in range(1, steps + 1)]
    visible = torch.cat([u <= t - steps, *near], dim=-1)  # (length, (1 + steps) * length)
    keys, values = (
        torch.cat(parts, dim=2).repeat_interleave(group, dim=1)
        for parts in zip(target, *own, strict=True)
    )
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible)


def merged_attention(
    query: Tensor,
    target: KeysValues,
    own: list[KeysValues],
    positions: Tensor,
    far_of: FarAttention,
) -> Tensor:
    """`mixed_attention` without a mask over all keys: attention far back, merged with diagonals.

    Args:
        query, target, own: as there.
        positions: (batch or 1, length), which begin at 0 with each document of a packed row.
        far_of: attention to the target's positions of the same document.

    Returns:
        (batch, heads, length, head_dim).
    """
    far, normaliser = far_of(query, target, len(own))
    if not own:
        return far
    scores, near_values = _diagonals(query, own, positions)
    scores = scores.to(normaliser.dtype)
    total = torch.logaddexp(scores.logsumexp(-1), normaliser)  # (batch, heads, length)
    attended = far * (normaliser - total).exp()[..., None].to(far.dtype)
    weights = (scores - total[..., None]).exp().to(query.dtype)
    for k, values in enumerate(near_values):
        attended = attended + weights[..., k, None] * values
    return attended


def _diagonals(
    query: Tensor, own: list[KeysValues], positions: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Score one position of each later step.

    Args:
        query, own: as in `mixed_attention`.
        positions: (batch or 1, length), in the document.

    Returns:
        Scores (batch, heads, length, steps), and values (batch, heads, length, head_dim) of each.
    """
    group = query.shape[1] // own[0][0].shape[1]
    lags = torch.arange(len(own) - 1, -1, -1, device=query.device)
    delayed = [  # position t holds what was at t - lag
        [F.pad(part, (0, 0, lag, -lag)).repeat_interleave(group, dim=1) for part in pair]
        for pair, lag in zip(own, reversed(range(len(own))), strict=True)
    ]
    near_keys, near_values = zip(*delayed, strict=True)
    scaled = query * query.shape[-1] ** -0.5
    scores = torch.stack([(scaled * keys).sum(-1) for keys in near_keys], dim=-1)
    hidden = positions[:, None, :, None] < lags  # (batch or 1, 1, length, steps)
    return scores.masked_fill(hidden, float("-inf")), [*near_values]


class _MergedAttention(torch.autograd.Function):
    """One softmax over two sets of keys, from torch's fused kernel for the larger one.

    The kernel gives the attention `far` and the logarithm of its normaliser, so that both sets can
    be weighed against each other. Its backward pass needs no more than the output and normaliser of
    the whole softmax in place of its own: the weights of the far keys are e^(score - normaliser),
    and the sum that the softmax subtracts is that of output and its gradient.
    """

    @staticmethod
    def forward(ctx, query, keys, values, scores, *near_values):
        shift, length = len(near_values), query.shape[2]
        # rows t ≥ shift against keys up to t - shift is a causal square: no mask
        square = (query[:, :, shift:], keys[:, :, : length - shift], values[:, :, : length - shift])
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        far, normaliser = kernel(*square, 0.0, True)
        total = torch.logsumexp(scores.to(normaliser.dtype), -1)  # (batch, heads, length)
        total[:, :, shift:] = torch.logaddexp(total[:, :, shift:], normaliser)
        weights = (scores.to(total.dtype) - total[..., None]).exp_().to(query.dtype)
        out = sum(weights[..., k, None] * near for k, near in enumerate(near_values))
        share = (normaliser - total[:, :, shift:]).exp_()[..., None]
        out[:, :, shift:] += far * share.to(far.dtype)
        ctx.save_for_backward(query, keys, values, out, total, weights, *near_values)
        return out

    @staticmethod
    def backward(ctx, gradient):  # (batch, heads, length, head_dim), as the output
        query, keys, values, out, total, weights, *near_values = ctx.saved_tensors
        shift, length = len(near_values), query.shape[2]
        mean = (gradient * out).sum(-1, keepdim=True)
        slopes = [(gradient * near).sum(-1, keepdim=True) - mean for near in near_values]
        scores_gradient = weights * torch.cat(slopes, -1)
        near_gradients = [weights[..., k, None] * gradient for k in range(shift)]
        far_gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient[:, :, shift:].contiguous(),
            query[:, :, shift:],
            keys[:, :, : length - shift],
            values[:, :, : length - shift],
            out[:, :, shift:],
            total[:, :, shift:],
            0.0,
            True,
        )
        query_gradient = F.pad(far_gradients[0], (0, 0, shift, 0))
        key_gradient, value_gradient = (F.pad(part, (0, 0, 0, shift)) for part in far_gradients[1:])
        return query_gradient, key_gradient, value_gradient, scores_gradient, *near_gradients
