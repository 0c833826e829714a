"""Divergence of a small language model from its target, in distributions of the next token.

In: states of both models that their LM heads read, at the trained positions. Out: sums over
positions. Logits exist for one chunk of positions at a time, in the backward pass once more.

p is the target's distribution of the next token and q the small model's, each over all tokens that
it has. A token that only one of them has, such as a row of padding, has no probability in the
other, so none of its mass is ever accepted.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .token_loss import LogitsOf, wide

CHUNK = 128  # positions whose logits are held at a time
Heads = tuple[LogitsOf, LogitsOf]  # the small model's and the target's
TINY = 1e-6  # a deviation of rewards below it is that of two equal distributions


class Divergence(NamedTuple):
    """The loss, and how near the two models are; only `loss` carries a gradient."""

    loss: Tensor  # (), summed over positions
    overlap: Tensor  # (), Σ_v min(p, q): the chance that a token drawn from q is accepted, summed
    agreed: Tensor  # (positions,), bool: both have the same first choice


def divergence(
    states: Tensor, features: Tensor, heads: Heads, kind: str, chunk_size: int = CHUNK
) -> Divergence:
    """Compare a small model with its target (Direct Alignment, Goel et al. 2024).

        kl      Σ_v p log(p / q), without the tokens that the small model lacks
        tvd     ½ Σ_v |p - q| = 1 - Σ_v min(p, q), whose gradient is that of a policy,
                -E_{v ~ q} [r(v) ∇log q(v)], with the reward r(v) = 1 where p(v) > q(v), else 0
        tvd++   the same with (r - μ) / σ in place of r

    μ and σ are mean and deviation of the reward over vocabulary and positions; that a token counts
    there as often as q draws it is our reading. As E_{v ~ q} [∇log q(v)] = 0, no μ changes the
    gradient, and r² = r makes σ² = μ (1 - μ): what is computed is tvd / σ, σ a constant of the
    batch.

    Args:
        states: (positions, width), the small model's.
        features: (positions, hidden), the target's.
        heads: the LM heads of both: (rows, width) → (rows, tokens).
        kind: "kl", "tvd" or "tvd++".
        chunk_size: positions whose logits are held at a time.
    """
    options = {"use_reentrant": False, "preserve_rng_state": False}
    pairs = zip(states.split(chunk_size), features.split(chunk_size), strict=True)
    chunks = [checkpoint(_chunk, *pair, heads, kind, **options) for pair in pairs]
    losses, overlaps, rewards, agreed = zip(*chunks, strict=True)
    loss = torch.stack(losses).sum()
    if kind == "tvd++":
        mean = torch.stack(rewards).sum() / max(len(states), 1)
        loss = loss / (mean * (1 - mean)).sqrt().clamp(min=TINY)
    return Divergence(loss, torch.stack(overlaps).sum(), torch.cat(agreed))


def _chunk(states: Tensor, features: Tensor, heads: Heads, kind: str) -> tuple[Tensor, ...]:
    """Loss, overlap and reward of a chunk, () each, and agreement (rows,); see `divergence`.

    states: (rows, width); features: (rows, hidden).
    """
    own = wide(heads[0](states))  # (rows, tokens of the small model)
    with torch.no_grad():
        # as q is computed: equal logits have equal probabilities, to the last bit
        probs = wide(heads[1](features)).log_softmax(-1).exp()  # (rows, its tokens)
    common = min(own.shape[-1], probs.shape[-1])
    log_q, p = own.log_softmax(-1)[:, :common], probs[:, :common]
    q = log_q.exp()
    # its gradient is 0 where p and q are equal, as the reward is
    distance = (p - q).relu().sum() + probs[:, common:].sum()
    if kind == "kl":
        loss = -torch.special.entr(p).sum() - torch.linalg.vecdot(p, log_q).sum()
    else:
        loss = distance
    overlap = probs.sum() - distance.detach()
    reward = torch.where(p > q, q.detach(), 0).sum()
    return loss, overlap, reward, own.detach().argmax(-1) == probs.argmax(-1)
