"""Training step of parallel drafters (P-EAGLE): fused layers → one pass of all depths → losses.

In: batches of the collator. Out: what is predicted of each position at every depth, and the losses
of EAGLE-3's step. A *chain* hangs on each position, its anchor a: depth 0 reads the token and the
features that are known there, deeper ones masks, at the positions behind it.

    position              a        a + 1    a + 2
    depth 0 reads         (x,g)                      and predicts the token a + 2
    depth 1 reads                  (m,h)             and predicts the token a + 3
    depth 2 reads                           (m,h)    and predicts the token a + 4
    each attends to       depth 0 of all up to a, and its own chain up to itself

Conditional drop (COD): of the n chains of a row, n · r^d are trained at depth d, those of a depth
among those of the depth before. All chains stand in one row of a pass, by depth:

    depth     0  0  0  0  0  1  1  1  2        r = 0.6, 5 positions
    anchor    0  1  2  3  4  0  1  3  1
"""

from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn import functional as F

from ...drafters.eagle3 import ParallelConfig, ParallelDrafter
from ...target import Target
from ..arguments import CoralTrainingArguments
from ..data.documents import Places
from ..data.encoding import IGNORED
from ..losses.token_loss import TokenLoss
from . import Trained, register_step
from .base import Batch, Pair, Predicted, drawn_generator, positions_of
from .objectives import by_step
from .own_head import Eagle3Step

PRECISION = 10**6  # of a share, so that a part is the same wherever it is computed


class Chains(NamedTuple):
    """The chains of a batch that are run, and what is trained of them."""

    anchors: Tensor  # (batch, places), indices of positions, those of depth 0 first
    depths: Tensor  # of shape (places,)
    # (steps, batch, positions), by the position that a depth stands at: what is trained
    kept: Tensor

    def mask(self, positions: Tensor) -> Tensor:
        """Which place attends to which: (batch, places, places).

        `positions`: (batch, length), which begin at 0 with each document of a row.
        """
        length = positions.shape[1]
        seen = Places.of(positions).mask()  # (batch, length, length)
        context = seen.gather(1, self.anchors[..., None].expand(-1, -1, length))
        is_own = self.anchors[:, :, None] == self.anchors[:, None, length:]
        is_own &= self.depths[length:] <= self.depths[:, None]
        return torch.cat([context, is_own], dim=2)

    def by_position(self, predicted: Tensor) -> Tensor:
        """Sort what was predicted by depth and position; 0 where nothing was.

        (batch, places, hidden) → (steps, batch, positions, hidden)
        """
        steps, batch, length = self.kept.shape
        found = predicted.new_zeros(steps, batch, length + steps, predicted.shape[-1])
        rows = torch.arange(batch, device=predicted.device)[:, None]
        depths = self.depths.expand(batch, -1)
        return found.index_put((depths, rows, self.anchors + depths), predicted)[:, :, :length]


def draw_chains(
    labels: Tensor, num_steps: int, keep_ratio: float = 1.0, chance: torch.Generator | None = None
) -> Chains:
    """Choose the chains that are run, and how deep each one is.

    Args:
        labels: (batch, length), -100 where not trained.
        num_steps: depths.
        keep_ratio: r, the share of a depth's chains that the next depth keeps.
        chance: where the draws come from; not read where all are kept.
    """
    length, is_trained = labels.shape[1] - 1, labels != IGNORED
    ahead = F.pad(is_trained[:, 2:], (0, num_steps)).unfold(1, num_steps, 1)
    # a chain ends before the first token that is not trained: (steps, batch, length)
    is_there = ahead.permute(2, 0, 1).long().cumprod(0).bool()
    order = torch.zeros(is_trained.shape[0], length, device=labels.device)
    if keep_ratio < 1:
        order.uniform_(generator=chance)
    order -= is_there[1].float()  # those that can be trained come first
    ranking = order.argsort(dim=1, stable=True)  # (batch, length)
    rank, count = ranking.argsort(dim=1), is_there[1].sum(1, keepdim=True)  # (batch, 1)
    anchors, kept = [], [is_there[0]]
    for depth in range(num_steps):
        anchors.append(ranking[:, : part_of(length, keep_ratio**depth)].sort(dim=1).values)
        if depth > 0:
            is_kept = is_there[depth] & (rank < part_of(count, keep_ratio**depth))
            kept.append(F.pad(is_kept, (depth, 0))[:, :length])
    depths = torch.cat([torch.full_like(own[0], i) for i, own in enumerate(anchors)])
    return Chains(torch.cat(anchors, dim=1), depths, torch.stack(kept))


def part_of(count: Any, share: float) -> Any:
    """A share of a number, or of a tensor of whole numbers of any shape, rounded up."""
    return -(-count * round(share * PRECISION) // PRECISION)


class MaskedContext:
    """What each place of a pass attends to, (batch, places, places); see `Context`."""

    def __init__(self, mask: Tensor):
        self._mask = mask[:, None]

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within the mask: (batch, heads, places, head_dim)."""
        # autocast may have left rotated ones in fp32, beside values in half precision
        query, key = query.to(value.dtype), key.to(value.dtype)
        mask = self._mask
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


class ParallelStep(Eagle3Step):
    """See [`coral_hf.training.steps.TrainingStep`]."""

    drafter = ParallelDrafter
    recipes = ("parallel",)
    stages = ("drafter",)
    unused = (*Eagle3Step.unused, "csra_weight", "single_step_share")

    def __init__(self, config: ParallelConfig, target: Target, args: CoralTrainingArguments):
        super().__init__(config, target, args)
        if args.resolved.num_steps < 2:
            raise ValueError(f"`num_steps` is {args.resolved.num_steps}; use 2 or more.")

    def predict(self, model: nn.Module, inputs: Pair, batch: Batch, num_steps: int) -> Predicted:
        """Predict all depths of all chains in one pass; see [`TrainingStep`]."""
        embeddings, states = inputs
        rows, length, _ = states.shape
        ratio = self.args.keep_ratio if model.training else 1.0
        chance = None if ratio == 1 else drawn_generator(states.device, self.args.process_index)
        chains = draw_chains(batch["labels"], num_steps, ratio, chance)
        positions = positions_of(batch).expand(rows, -1)
        drafter = extract_model_from_parallel(model)
        masks = chains.anchors.shape[1] - length
        shared = drafter.fuse(drafter.mask_hidden).expand(rows, masks, -1)
        masked = drafter.mask_embedding.expand(rows, masks, -1)
        predicted = model(
            torch.cat([embeddings.to(masked.dtype), masked], dim=1),
            torch.cat([states, shared], dim=1),
            positions.gather(1, chains.anchors) + chains.depths,
            MaskedContext(chains.mask(positions)),
        )
        return chains.by_position(predicted), chains.kept

    def notes(self, trained: Trained, found: TokenLoss) -> dict[str, Tensor]:
        """What is logged: averages over what each depth was trained on."""
        kept = torch.ones_like(found.agreed) if trained.kept is None else trained.kept
        scale = kept.shape[1] / kept.sum(1).clamp(min=1)  # of shape (steps,)
        classification = found.classification * scale
        return {
            "classification_loss": classification.mean(),
            **by_step("classification_loss", classification),
            **by_step("agreement", found.agreed.sum(-1) * scale),
        }


register_step(ParallelConfig.model_type, ParallelStep)
