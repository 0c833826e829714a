"""Losses on tokens: distillation of the target's distribution of the next token.

In: predicted features of all steps at the trained positions, the target's features there, its LM
head. Out: sums over positions. Logits exist for one chunk of positions at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# (rows, hidden) → (rows, vocab)
LogitsOf = Callable[[Tensor], Tensor]


class TokenWeights(NamedTuple):
    """How the losses on tokens are weighted."""

    classification: float = 1.0  # of the cross-entropy over the whole vocabulary
    top_k: float = 0.0  # of the cross-entropy over the target's most probable tokens
    k: int = 10  # how many those are


CLASSIFICATION = TokenWeights()


class TokenLoss(NamedTuple):
    """The losses on tokens of each step; all but `loss` are for the log and carry no gradient."""

    loss: Tensor  # (steps,), weighted, summed over positions
    classification: Tensor  # (steps,), -Σ_v p(v) log q(v), summed over positions
    top_k: Tensor  # (steps,), the same over the target's top k, summed over positions
    agreed: Tensor  # (steps, positions), bool: the drafter's first choice is the target's


def token_loss(
    predicted: Tensor,
    target: Tensor,
    logits_of: LogitsOf,
    weights: TokenWeights = CLASSIFICATION,
    chunk_size: int = 128,
    chunk_loss: "ChunkLoss | None" = None,
) -> TokenLoss:
    """Distil the target's distribution p of the next token into the drafter's q.

    The classification loss of EAGLE and HASS, -Σ_v p(v) log q(v), and the top-k distillation of
    HASS (section 3.1), the same sum over the k most probable tokens of p alone, with p as it is.

    The frozen head makes the gradient with respect to features known in the forward pass,
    (Σp · softmax(z) - p)·∂z for each of the sums, so each chunk's logits are dropped at once and
    memory does not grow with vocabulary × steps.

    Args:
        predicted: (steps, positions, hidden).
        target: (positions, hidden).
        logits_of: the target's LM head.
        chunk_size: rows of logits held at a time.
        chunk_loss: of a chunk's logits; in torch's own operations by default.
    """
    chunk_loss = TorchChunkLoss() if chunk_loss is None else chunk_loss
    return TokenLoss(
        *_ChunkedTokenLoss.apply(predicted, target, logits_of, weights, chunk_size, chunk_loss)
    )


class _ChunkedTokenLoss(torch.autograd.Function):
    """`token_loss` with the gradient computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx, predicted, target, logits_of, weights, chunk_size, chunk_loss):
        steps, positions, _ = predicted.shape  # (steps, positions, hidden)
        classification, top_k = predicted.new_zeros(2, steps, dtype=torch.float32)
        agreed = torch.zeros(steps, positions, dtype=torch.bool, device=predicted.device)
        gradient = torch.zeros_like(predicted)
        target_buffer = None
        for start in range(0, positions, chunk_size):
            rows = slice(start, start + chunk_size)
            with torch.no_grad():
                target_buffer = _refill(target_buffer, logits_of(target[rows]))
            goal = make_goal(target_buffer[: len(target[rows])], weights)
            for step in range(steps):
                features = predicted[step, rows].detach().requires_grad_()
                with torch.enable_grad():
                    raw = logits_of(features)
                found = chunk_loss(raw.detach(), goal, weights)
                classification[step] += found.classification
                top_k[step] += found.top_k
                agreed[step, rows] = found.agreed
                slope = found.slope.to(raw.dtype)
                (gradient[step, rows],) = torch.autograd.grad(raw, features, slope)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(classification, top_k, agreed)
        loss = weights.classification * classification + weights.top_k * top_k
        return loss, classification, top_k, agreed

    @staticmethod
    def backward(ctx, loss_gradient: Tensor, *_):  # of shape (steps,)
        (gradient,) = ctx.saved_tensors
        slopes = gradient * loss_gradient[:, None, None].to(gradient.dtype)
        return slopes, None, None, None, None, None


class Goal(NamedTuple):
    """The distribution of the target at the positions of a chunk."""

    probs: Tensor  # (rows, vocab)
    first: Tensor  # (rows,), the most probable token
    top_probs: Tensor  # (rows, k)
    top_tokens: Tensor  # (rows, k)


def make_goal(logits: Tensor, weights: TokenWeights) -> Goal:
    """Make the goal of target logits (rows, vocab), which its probabilities overwrite."""
    first = logits.argmax(-1)
    probs = torch.softmax(logits, -1, out=logits)
    k = min(weights.k, logits.shape[-1]) if weights.top_k else 0
    return Goal(probs, first, *probs.topk(k, dim=-1))


class Chunk(NamedTuple):
    """The losses of one step on a chunk, and their gradient with respect to its logits."""

    classification: Tensor  # ()
    top_k: Tensor  # ()
    agreed: Tensor  # (rows,)
    slope: Tensor  # (rows, vocab)


# logits (rows, vocab), which it may overwrite, the goal, the weights → the losses
ChunkLoss = Callable[[Tensor, Goal, TokenWeights], Chunk]


class TorchChunkLoss:
    """The losses of a chunk in torch's own operations.

    Chunks share a buffer (rows, vocab): large temporaries cost page faults at every allocation.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None  # (rows, vocab)

    def __call__(self, logits: Tensor, goal: Goal, weights: TokenWeights) -> Chunk:
        """Compute the losses of (rows, vocab) logits, and in the buffer their gradient."""
        self._buffer = _refill(self._buffer, logits)
        logits = self._buffer[: len(logits)]
        highest, first = logits.max(-1, keepdim=True)
        logits -= highest
        classification = -torch.dot(goal.probs.view(-1), logits.view(-1))
        top_logits = logits.gather(-1, goal.top_tokens)  # (rows, k)
        total = logits.exp_().sum(-1, keepdim=True)
        log_total = total.log()
        top_k = (goal.top_probs * (log_total - top_logits)).sum()
        mass = weights.classification + weights.top_k * goal.top_probs.sum(-1, keepdim=True)
        # mass · softmax(z) - w_cls p - w_topk p over the top k
        slope = logits.mul_(mass / total).sub_(goal.probs, alpha=weights.classification)
        slope.scatter_add_(-1, goal.top_tokens, -weights.top_k * goal.top_probs)
        return Chunk(classification + log_total.sum(), top_k, first[:, 0] == goal.first, slope)


def _refill(buffer: Tensor | None, logits: Tensor) -> Tensor:
    """Copy `logits` (rows, vocab) in fp32 to the first rows of `buffer`, or to a new one.

    The first chunk is the longest, so the others fit.
    """
    if buffer is None:
        return logits.to(torch.float32, copy=True)
    buffer[: len(logits)].copy_(logits)
    return buffer
