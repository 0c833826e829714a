"""Losses on tokens: distillation of a distribution of the next token.

In: predicted features of all steps at the trained positions, what is to be predicted there, an LM
head. Out: sums over positions. Logits exist for one chunk of positions at a time.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 128  # positions whose logits are held at a time
FEW = 8  # of them, whose losses a CPU computes at a time
# (*batch, hidden) → (*batch, vocab)
LogitsOf = Callable[[Tensor], Tensor]


class TokenWeights(NamedTuple):
    """How the losses on tokens are weighted."""

    classification: float = 1.0  # of the cross-entropy over the whole vocabulary
    top_k: float = 0.0  # of the cross-entropy over the most probable tokens of the goal
    k: int = 10  # how many those are


CLASSIFICATION = TokenWeights()


class TokenLoss(NamedTuple):
    """The losses on tokens; all but `loss` are for the log and carry no gradient."""

    loss: Tensor  # (), weighted, summed over steps and positions
    classification: Tensor  # (steps,), -Σ_v p(v) log q(v), summed over positions
    top_k: Tensor  # (steps,), the same over the top k of the goal, summed over positions
    agreed: Tensor  # (steps, positions), bool: nothing is likelier than the goal's first choice


class Goal(NamedTuple):
    """What is to be predicted at some positions."""

    probs: Tensor  # (rows, vocab); all 0 where nothing is trained
    first: Tensor  # (rows,), the most probable token; -1 where nothing is trained


class Head(NamedTuple):
    """An LM head, and what is trained of it."""

    logits_of: LogitsOf
    weights: Sequence[Tensor] = ()  # of any shapes
    is_by_step: bool = False  # whether each step has its own: (steps, rows, hidden) are read


def token_loss(
    predicted: Tensor,
    goal_of: Callable[[slice], Goal],
    head: Head,
    weights: TokenWeights = CLASSIFICATION,
    step_weights: Tensor | None = None,
    kept: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> TokenLoss:
    """Distil a goal's distribution p of the next token into the drafter's q.

    The classification loss of EAGLE and HASS, -Σ_v p(v) log q(v), and the top-k distillation of
    HASS (section 3.1), the same sum over the k most probable tokens of p alone, with p as it is.

    The gradient with respect to logits is known, Σp · softmax(z) - p for each of the sums, so those
    of features and head are computed chunk by chunk in the forward pass: a chunk's logits are
    dropped at once, and memory does not grow with vocabulary × steps.

    Args:
        predicted: (steps, positions, hidden).
        goal_of: of some of the positions.
        head: of the drafter.
        weights: of the losses.
        step_weights: (steps,), all 1 by default.
        kept: (steps, positions), those that have a loss; all by default.
        chunk_size: positions whose logits are held at a time.
    """
    trained = [weight for weight in head.weights if weight.requires_grad]
    options = goal_of, head, weights, step_weights, kept, chunk_size
    return TokenLoss(*_ChunkedLoss.apply(predicted, options, torch.is_grad_enabled(), *trained))


class _ChunkedLoss(torch.autograd.Function):
    """`token_loss` with the gradients computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx, predicted, options, has_gradient, *weights):
        goal_of, head, shares, step_weights, kept, size = options
        steps, positions, _ = predicted.shape
        gradients = [torch.zeros_like(one) for one in (predicted, *weights)]
        classification, top_k = sums = [wide(predicted.new_zeros(steps)) for _ in range(2)]
        agreed = torch.zeros(steps, positions, dtype=torch.bool, device=predicted.device)
        scale = torch.ones_like(top_k) if step_weights is None else step_weights
        all_kept = torch.ones_like(agreed) if kept is None else kept
        # a trained head's gradient, as large as the head, is added up once a chunk
        pieces = [slice(None)] if weights or head.is_by_step else range(steps)
        for start in range(0, positions, size):
            rows = slice(start, start + size)
            goal = goal_of(rows)
            k = min(shares.k, goal.probs.shape[-1]) if shares.top_k else 0
            whole = [*goal, *goal.probs.topk(k, dim=-1)]
            for piece in pieces:
                part = predicted[piece, rows].detach().requires_grad_()
                is_kept, own, where = all_kept[piece, rows], whole, ...
                if kept is not None and not head.is_by_step:  # of the others there are no logits
                    where = is_kept.nonzero(as_tuple=True)
                    own = [of[where[-1]] for of in whole]
                with torch.set_grad_enabled(has_gradient):
                    raw = head.logits_of(part[where])
                slope = raw.detach()
                *losses, is_first = _chunk_losses(slope, own, shares)
                agreed[piece, rows][where] = is_first
                for total, one in zip(sums, losses, strict=True):
                    spread = total.new_zeros(is_kept.shape)
                    spread[where] = one.to(spread.dtype)
                    total[piece] += (spread * is_kept).sum(-1)
                if step_weights is not None or kept is not None:
                    slope *= (scale[piece][..., None] * is_kept)[where][..., None]
                if has_gradient:
                    unused = {"allow_unused": True, "materialize_grads": True}
                    found = torch.autograd.grad(raw, [part, *weights], slope, **unused)
                    places = [gradients[0][piece, rows], *gradients[1:]]
                    for place, one in zip(places, found, strict=True):
                        place += one
                del raw, slope  # before the next logits are made
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(classification, top_k, agreed)
        losses = shares.classification * classification + shares.top_k * top_k
        return (losses * scale).sum(), classification, top_k, agreed

    @staticmethod
    def backward(ctx, slope: Tensor, *_):  # of shape ()
        predicted, *weights = (one * slope.to(one.dtype) for one in ctx.saved_tensors)
        return predicted, None, None, *weights


def target_goal(logits: Tensor) -> Goal:
    """Make a goal of the target's own distribution, in place of its logits (rows, vocab)."""
    first, logits = logits.argmax(-1), wide(logits)
    return Goal(torch.softmax(logits, -1, out=logits), first)


def draft_goal(logits: Tensor, tokens: Tensor) -> Goal:
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
    return Goal(probs, torch.where(is_inside, best, -1))


def label_goal(labels: Tensor, tokens: Tensor) -> Goal:
    """Make a goal of a text's own tokens; a position whose token is no draft token is not trained.

    Args:
        labels: (rows,), their ids.
        tokens: (draft_vocab,), ids of draft tokens.
    """
    probs = tokens == labels[:, None]  # (rows, draft_vocab)
    return Goal(probs.float(), torch.where(probs.any(-1), probs.byte().argmax(-1), -1))


def _chunk_losses(
    logits: Tensor, goal: Sequence[Tensor], weights: TokenWeights
) -> Iterable[Tensor]:
    """Compute the losses of a chunk, and write their gradient into its logits.

    A CPU computes them a few rows at a time, which stay in its cache; a GPU all at once.

    Args:
        logits: (*batch, rows, vocab).
        goal: what [`Goal`] has, and its most probable tokens: their probabilities and ids, (rows,
            k) each.
        weights: how much each loss counts in the gradient.

    Returns:
        Classification and top-k loss, and which first choices are the goal's: (*batch, rows) each.
    """
    size = FEW if logits.device.type == "cpu" else logits.shape[-2]
    parts = zip(logits.split(size, dim=-2), *(of.split(size) for of in goal), strict=True)
    with torch.autocast(logits.device.type, enabled=False):  # it would sum in half precision
        found = [_differentiate(weights, *part) for part in parts]
    return (torch.cat(one, dim=-1) for one in zip(*found, strict=True))


def _differentiate(
    weights: TokenWeights,
    raw: Tensor,
    probs: Tensor,
    first: Tensor,
    top_probs: Tensor,
    top_tokens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `_chunk_losses` does of some rows: `raw` are logits (*batch, rows, vocab)."""
    logits = wide(raw)
    highest = logits.amax(-1, keepdim=True)
    chosen = first.clamp(min=0).expand(raw.shape[:-1])[..., None]
    agreed = (logits.gather(-1, chosen) == highest)[..., 0] & (first >= 0)
    logits -= highest
    probs = probs.to(logits.dtype)
    own = torch.linalg.vecdot(logits, probs.expand_as(logits))
    top_tokens = top_tokens.expand(*raw.shape[:-1], -1)
    top_probs = top_probs.to(logits.dtype).expand_as(top_tokens)
    top_logits = logits.gather(-1, top_tokens)  # (*batch, rows, k)
    total = logits.exp_().sum(-1, keepdim=True)
    log_total, is_trained = total.log(), (first >= 0)[:, None]
    top_k = (top_probs * (log_total - top_logits)).sum(-1)
    mass = weights.classification * is_trained + weights.top_k * top_probs.sum(-1, keepdim=True)
    # mass · softmax(z) - w_cls p - w_topk p over the top k
    slope = logits.mul_(mass / total).sub_(probs, alpha=weights.classification)
    raw.copy_(slope.scatter_add_(-1, top_tokens, -weights.top_k * top_probs))
    return (is_trained * log_total)[..., 0] - own, top_k, agreed


def wide(tensor: Tensor) -> Tensor:
    """A tensor of any shape in fp32, or in its own dtype where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
