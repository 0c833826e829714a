"""The loss of a drafter that has an LM head of its own, over a part of the target's vocabulary.

In: predicted hidden states of all steps at the trained positions, the target's features there, both
heads. Out: sums over positions. Logits exist for one chunk of positions at a time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# positions whose logits are held at a time, those of all steps together: a trained head's gradient,
# as large as the head, is added up once a chunk
CHUNK = 64


class DraftGoal(NamedTuple):
    """The target's distribution of the next token at some positions, over a draft vocabulary."""

    probs: Tensor  # (rows, draft_vocab), renormalised; 0 where the first choice is no draft token
    first: Tensor  # (rows,), the draft id of the first choice, -1 where it is no draft token
    is_trained: Tensor | None = None  # (steps, rows), where not all steps are trained


class DraftLoss(NamedTuple):
    """The loss of all steps; all but `loss` are for the log and carry no gradient."""

    loss: Tensor  # (), weighted by step, summed over positions
    classification: Tensor  # (steps,), -Σ_v p(v) log q(v), summed over positions
    agreed: Tensor  # (steps, positions), bool: the drafter's first choice is the target's


def draft_goal(logits: Tensor, tokens: Tensor) -> DraftGoal:
    """Restrict the target's distribution to a draft vocabulary (EAGLE-3's released training).

    Tokens outside of it have no share: the others are renormalised. A position whose first choice
    is outside is not trained, since no draft could be accepted there.

    Args:
        logits: (rows, vocab), the target's.
        tokens: (draft_vocab,), their ids.
    """
    part = wide(logits[:, tokens])
    best = part.argmax(-1)
    is_inside = tokens[best] == logits.argmax(-1)
    probs = part.softmax(-1) * is_inside[:, None]
    return DraftGoal(probs, torch.where(is_inside, best, -1))


def label_goal(labels: Tensor, tokens: Tensor, dtype: torch.dtype) -> DraftGoal:
    """Make a goal of a text's own tokens; a position whose token is no draft token is not trained.

    Args:
        labels: (rows,), their ids.
        tokens: (draft_vocab,), ids of draft tokens.
        dtype: of the goal.
    """
    probs = tokens == labels[:, None]  # (rows, draft_vocab)
    first = torch.where(probs.any(-1), probs.long().argmax(-1), -1)
    return DraftGoal(probs.to(dtype), first)


def cross_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    """-Σ_v p(v) log q(v) of each row: (*steps, rows, draft_vocab) → (*steps, rows)."""
    with torch.autocast(logits.device.type, enabled=False):  # it would sum in half precision
        return probs.sum(-1) * logits.logsumexp(-1) - torch.linalg.vecdot(logits, probs)


def draft_loss(
    predicted: Tensor,
    goal_of: Callable[[slice], DraftGoal],
    logits_of: Callable[[Tensor], Tensor],
    weights: Sequence[Tensor],
    step_weights: Tensor,
    chunk_size: int = CHUNK,
    kept: Tensor | None = None,
) -> DraftLoss:
    """Distil the target's distribution over the draft vocabulary into the drafter's.

    Gradients, those of the head too, are computed chunk by chunk in the forward pass, so that a
    chunk's logits are dropped at once and no product with the head is computed twice.

    Args:
        predicted: (steps, positions, hidden).
        goal_of: of some of the positions.
        logits_of: the drafter's head, (*batch, hidden) → (*batch, draft_vocab).
        weights: what `logits_of` trains, of any shapes.
        step_weights: (steps,).
        chunk_size: positions whose logits are held at a time.
        kept: (steps, positions), those that have a loss; of the others no logits are computed.
            None: all.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    functions = (goal_of, logits_of), step_weights, chunk_size, kept, torch.is_grad_enabled()
    return DraftLoss(*_ChunkedDraftLoss.apply(predicted, *functions, *trained))


class _ChunkedDraftLoss(torch.autograd.Function):
    """`draft_loss` with the gradient computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx, predicted, functions, step_weights, chunk_size, kept, has_gradient, *weights):
        (goal_of, logits_of), (steps, positions, _) = functions, predicted.shape
        gradients = [torch.zeros_like(one) for one in (predicted, *weights)]
        classification = wide(predicted.new_zeros(steps))
        agreed = torch.zeros(steps, positions, dtype=torch.bool, device=predicted.device)
        for start in range(0, positions, chunk_size):
            rows = slice(start, start + chunk_size)
            goal, part = goal_of(rows), predicted[:, rows].detach().requires_grad_()
            with torch.set_grad_enabled(has_gradient):
                if kept is None:
                    losses, agreed[:, rows] = _chunk(part, goal, logits_of)
                else:
                    losses, agreed[:, rows] = _chunk_of(kept[:, rows], part, goal, logits_of)
                total = (losses * step_weights).sum()
            classification += losses.detach()
            if has_gradient:
                found = torch.autograd.grad(
                    total, [part, *weights], allow_unused=True, materialize_grads=True
                )
                gradients[0][:, rows] = found[0]
                for whole, one in zip(gradients[1:], found[1:], strict=True):
                    whole += one
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(classification, agreed)
        return (classification * step_weights).sum(), classification, agreed

    @staticmethod
    def backward(ctx, slope: Tensor, *_):  # of shape ()
        predicted, *weights = (one * slope.to(one.dtype) for one in ctx.saved_tensors)
        return predicted, None, None, None, None, None, *weights


def _chunk(
    part: Tensor, goal: DraftGoal, logits_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Loss of each step, (steps,), and agreement (steps, rows), of `part` (steps, rows, hidden)."""
    logits = wide(logits_of(part))  # (steps, rows, draft_vocab)
    losses = cross_entropy(logits, goal.probs)
    losses = losses if goal.is_trained is None else losses * goal.is_trained
    return losses.sum(-1), logits.detach().argmax(-1) == goal.first


def _chunk_of(
    kept: Tensor, part: Tensor, goal: DraftGoal, logits_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """`_chunk` of the rows that are kept, by (steps, rows)."""
    steps, rows = kept.nonzero(as_tuple=True)  # (kept,) each
    logits = wide(logits_of(part[steps, rows]))  # (kept, draft_vocab)
    losses = wide(part.new_zeros(len(part)))
    losses = losses.index_add(0, steps, cross_entropy(logits, goal.probs[rows]))
    agreed = torch.zeros_like(kept)
    agreed[steps, rows] = logits.detach().argmax(-1) == goal.first[rows]
    return losses, agreed


def wide(tensor: Tensor) -> Tensor:
    """A tensor of any shape in fp32, or in its own dtype where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
