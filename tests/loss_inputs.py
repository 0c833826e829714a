"""Features and a head of small sizes, and the plain form of a loss, for the tests of the losses."""

import torch
from torch import Tensor, nn

from coral_hf.lm_head import LMHead
from coral_hf.training.losses.token_loss import (
    CLASSIFICATION,
    Head,
    LogitsOf,
    TokenLoss,
    TokenWeights,
    target_goal,
    token_loss,
)

STEPS, POSITIONS, HIDDEN, VOCAB = 3, 11, 8, 50


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features() -> tuple[Tensor, Tensor]:
    """Predicted (steps, positions, hidden), a leaf, and the target's (positions, hidden)."""
    return randn(STEPS, POSITIONS, HIDDEN).requires_grad_(), randn(POSITIONS, HIDDEN, seed=1)


def make_head(dtype: torch.dtype = torch.float32, **finish) -> LMHead:
    module = nn.Linear(HIDDEN, VOCAB, bias=False)
    module.weight.data = randn(VOCAB, HIDDEN, seed=2).to(dtype)
    return LMHead(module.requires_grad_(False), **finish)


ONES = torch.ones(STEPS)


def chunked_token_loss(
    predicted: Tensor,
    target: Tensor,
    logits_of: LogitsOf,
    weights: TokenWeights = CLASSIFICATION,
    chunk_size: int = 128,
    steps: Tensor | None = None,
) -> TokenLoss:
    """`token_loss`, shapes too, of a target's own distribution and head."""
    head = Head(logits_of)
    goals = lambda rows: target_goal(logits_of(target[rows]))  # noqa: E731
    return token_loss(predicted, goals, head, weights, steps, chunk_size=chunk_size)


def plain_token_loss(
    predicted: Tensor,
    target: Tensor,
    logits_of: LogitsOf,
    weights: TokenWeights = CLASSIFICATION,
    steps: Tensor = ONES,
) -> TokenLoss:
    """`token_loss`, shapes too, without chunks and with gradients of torch, for tests."""
    probs = logits_of(target).float().softmax(-1)
    log_probs = logits_of(predicted).float().log_softmax(-1)  # (steps, positions, vocab)
    classification = -(probs * log_probs).sum((-1, -2))
    in_top = torch.zeros_like(probs).scatter_(-1, probs.topk(weights.k, dim=-1).indices, 1.0)
    top_k = -(in_top * probs * log_probs).sum((-1, -2))
    loss = weights.classification * classification + weights.top_k * top_k
    loss = (loss * steps[: len(loss)].to(loss.device)).sum()
    return TokenLoss(loss, classification, top_k, log_probs.argmax(-1) == probs.argmax(-1))
