"""The multi-step unroll: the drafter run N times on its own predictions, as when it drafts.

In: a target's features and the embeddings of the tokens after them. Out: the predicted features of
every step. Context mixing of HASS (Zhang et al. 2024, harmonized context alignment) with -inf
masks. A step's inputs are detached; the graph of all steps is kept, since CSRA couples them.

    position t               0      1      2      3
    step 1 reads             f0     f1     f2     f3           predicts f̂¹_1 … f̂¹_4
    step 2 reads q¹          f0     f̂¹_1   f̂¹_2   f̂¹_3         its own outputs, shifted right by one
    step 3 reads q²          f0     f̂²_1   f̂²_2   f̂²_3
    always with embeddings   e(x1)  e(x2)  e(x3)  e(x4)

    step 3 at position 3 attends to     f0  f1   target features up to t - 2
                                        q¹_2     the first step's at t - 1
                                        q²_3     its own input at t
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling_coral import CausalContext

# keys and values, (batch, kv_heads, length, head_dim) each, of every step so far, by layer and step
Seen = dict[tuple[int, int], tuple[Tensor, Tensor]]


class UnrollContext:
    """What one step of the unroll attends to: the keys and values of the steps before it."""

    def __init__(self, step: int, seen: Seen):
        """`step` counts from 0; `seen` is shared by the steps of an unroll."""
        self._step = step
        self._seen = seen

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See [`coral_hf.modeling_coral.Context`]."""
        # gradient checkpointing runs a step twice; the first run's tensors stay
        self._seen.setdefault((layer_idx, self._step), (key, value))
        if self._step == 0:
            return CausalContext().attend(layer_idx, query, key, value)
        own = [self._seen[layer_idx, step] for step in range(1, self._step)] + [(key, value)]
        return mixed_attention(query, self._seen[layer_idx, 0], own)


def mixed_attention(
    query: Tensor, target: tuple[Tensor, Tensor], own: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Attention over the target's features, shifted, and one position of each earlier step.

    At the step with `own` of length s, position t attends to target positions up to t - s and to
    the k-th of `own` (from 1) at position t - (s - k).

    Args:
        query: (batch, heads, length, head_dim).
        target: keys and values of step one, (batch, kv_heads, length, head_dim) each.
        own: the same of each later step, the newest last.

    Returns:
        (batch, heads, length, head_dim).
    """
    batch, heads, length, width = query.shape
    # (batch, kv, group, length, dim)
    grouped = query.view(batch, target[0].shape[1], -1, length, width) * width**-0.5
    far = _target_scores(grouped, target[0], shift=len(own))
    lags = range(len(own) - 1, -1, -1)
    near = [_diagonal_scores(grouped, keys, lag) for (keys, _), lag in zip(own, lags, strict=True)]
    weights = torch.cat([far, *near], dim=-1).softmax(-1, dtype=torch.float32).to(query.dtype)
    attended = weights[..., :length] @ target[1][:, :, None]
    for index, ((_, values), lag) in enumerate(zip(own, lags, strict=True)):
        attended = attended + weights[..., length + index, None] * _delay(values, lag)[:, :, None]
    return attended.reshape(batch, heads, length, width)


def _target_scores(query: Tensor, keys: Tensor, shift: int) -> Tensor:
    """(batch, kv, group, length, length): scores of target positions up to t - shift."""
    scores = query @ keys[:, :, None].transpose(-1, -2)
    length = scores.shape[-1]
    hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1 - shift)
    return scores.masked_fill(hidden, float("-inf"))


def _diagonal_scores(query: Tensor, keys: Tensor, lag: int) -> Tensor:
    """(batch, kv, group, length, 1): scores of position t - lag of one step, -inf if t < lag."""
    scores = (query * _delay(keys, lag)[:, :, None]).sum(-1, keepdim=True)
    hidden = torch.arange(scores.shape[-2], device=scores.device)[:, None] < lag
    return scores.masked_fill(hidden, float("-inf"))


def _delay(states: Tensor, lag: int) -> Tensor:
    """Move (batch, kv, length, dim) right by `lag`: position t holds what was at t - lag."""
    return states if lag == 0 else F.pad(states, (0, 0, lag, 0))[:, :, : states.shape[2]]


def unroll(drafter: nn.Module, embeddings: Tensor, features: Tensor, num_steps: int) -> Tensor:
    """Run the drafter `num_steps` times, each time on its own last predictions.

    Args:
        drafter: a [`CoralDrafter`], wrapped or not.
        embeddings: (batch, length, hidden), of the token after each feature.
        features: (batch, length, hidden), the target's.
        num_steps: N of the papers, at least 1.

    Returns:
        (steps, batch, length, hidden): at [j, :, t] the step's prediction of feature t + 1.
    """
    seen: Seen = {}
    inputs, predicted = features, []
    positions = torch.arange(features.shape[1], device=features.device)[None]
    for step in range(num_steps):
        predicted.append(drafter(embeddings, inputs, positions, UnrollContext(step, seen)))
        # the first position has no prediction of its own and keeps the target's feature
        first = features[:, :1].to(predicted[-1].dtype)
        inputs = torch.cat([first, predicted[-1][:, :-1].detach()], dim=1)
    return torch.stack(predicted)
