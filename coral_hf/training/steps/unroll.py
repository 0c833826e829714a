"""Multi-step unroll: N forward passes of the drafter on its own predictions, as when it drafts.

In: a target's features and the embeddings of the tokens after them. Out: the predicted features of
every step. Context mixing of HASS (Zhang et al. 2024, harmonized context alignment) with -inf
masks; EAGLE-3's training-time test attends to the same positions, by another indexing. A step's
inputs are detached unless a family lets gradients through; the graph of all steps is kept.

    position t               0      1      2      3
    step 1 reads             f0     f1     f2     f3           predicts f̂¹_1 … f̂¹_4
    step 2 reads q¹          f0     f̂¹_1   f̂¹_2   f̂¹_3         its own outputs, shifted right by one
    step 3 reads q²          f0     f̂²_1   f̂²_2   f̂²_3
    always with embeddings   e(x1)  e(x2)  e(x3)  e(x4)

    step 3 at position 3 attends to     f0  f1   target features up to t - 2
                                        q¹_2     the first step's at t - 1
                                        q²_3     its own input at t
"""

import importlib.util
from collections.abc import Callable
from functools import cache, cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import pad

from ..data.documents import REPEATED, Part, Places, has_branches, parts_of
from .attention import KeysValues, merged_attention, mixed_attention

BLOCK = 128  # queries, and keys, that flex attention sees or skips together
LEAST_HEAD_DIM = 16  # of its kernel
# keys and values of every step so far, by layer and step
Seen = dict[tuple[int, int], KeysValues]


class UnrollContext:
    """Context of one step of the unroll: the keys and values of the steps before it.

    Not a dataclass: FSDP copies those that it passes on, and `seen` has to stay shared.
    """

    def __init__(self, step: int, seen: Seen, rows: "RowAttention"):
        """`step` counts from 0; `seen` and `rows` are shared by the steps of an unroll."""
        self.step, self.seen, self.rows = step, seen, rows

    # `seen` changes with every step, and torch.compile would compile each of them again
    @torch.compiler.disable
    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See [`coral_hf.drafters.layers.Context`]; (batch, heads, length, head_dim)."""
        # autocast may have left rotated ones in fp32, beside values in half precision
        query, key = query.to(value.dtype), key.to(value.dtype)
        # gradient checkpointing runs a step twice; the tensors of the first run stay
        self.seen.setdefault((layer_idx, self.step), (key, value))
        before = [self.seen[layer_idx, step] for step in range(self.step)]
        target, *own = [*before, (key, value)]
        return self.rows.attend(query, target, own)


class RowAttention:
    """`mixed_attention` within each document of the rows of a batch: no document sees another.

    Args:
        positions: (batch or 1, length), which begin at 0 with each document.
        is_packed: whether there are several documents in a row.
    """

    def __init__(self, positions: Tensor, is_packed: bool = True):
        self._positions, self._is_packed = positions, is_packed
        self._masks: dict[int, flex.BlockMask] = {}  # of flex attention, by lag, for all layers

    @cached_property
    def _parts(self) -> list[list[Part]]:
        return parts_of(self._positions)  # the host reads them

    def attend(self, query: Tensor, target: KeysValues, own: list[KeysValues]) -> Tensor:
        """Compute the attention of each position of the rows.

        Args:
            query: (batch, heads, length, head_dim).
            target, own: keys and values, (batch, kv_heads, length, head_dim) each.

        Returns:
            (batch, heads, length, head_dim).
        """
        if fits_flex(query):
            return merged_attention(query, target, own, self._positions, self._far)
        if not self._is_packed:
            return mixed_attention(query, target, own)
        tensors = [query, *target, *(one for pair in own for one in pair)]
        rows = []
        for row, parts in enumerate(self._parts):
            attended = []
            for part in parts:
                query, keys, values, *rest = (part.of(one[row : row + 1], dim=2) for one in tensors)
                pairs = list(zip(rest[::2], rest[1::2], strict=True))
                whole = mixed_attention(query, (keys, values), pairs)
                attended.append(whole[:, :, part.shared :])
            rows.append(torch.cat(attended, dim=2))
        return torch.cat(rows)

    def _far(self, query: Tensor, target: KeysValues, lag: int) -> tuple[Tensor, Tensor]:
        """See `FarAttention`; (batch, heads, length, head_dim) and (batch, heads, length).

        By torch's flex attention: blocks of keys that no query of a block may see are skipped, and
        the mask of the others is computed in the kernel.
        """
        if lag not in self._masks:
            self._masks[lag] = block_mask(self._positions, lag)
        request = flex.AuxRequest(lse=True)
        mask = self._masks[lag]
        far, aux = _kernel()(query, *target, block_mask=mask, enable_gqa=True, return_aux=request)
        return far, aux.lse


def check_branches(position_ids: Tensor | None, num_steps: int) -> None:
    """Raise a ValueError for more steps than the tokens that branches repeat allow."""
    if num_steps >= REPEATED and position_ids is not None and has_branches(position_ids):
        raise ValueError(
            f"`num_steps` is {num_steps}, but rows that share prompts allow {REPEATED - 1} at"
            " most; pass share_prompts=False, and write a feature cache with that again."
        )


def unroll(
    drafter: nn.Module,
    embeddings: Tensor,
    features: Tensor,
    num_steps: int,
    position_ids: Tensor | None = None,
    is_detached: bool = True,
) -> Tensor:
    """Run the drafter `num_steps` times, each time on its own last predictions.

    Args:
        drafter: a [`CoralDrafter`], wrapped or not.
        embeddings: (batch, length, hidden), of the token after each feature.
        features: (batch, length, hidden), the target's.
        num_steps: N of CORAL and HASS, at least 1.
        position_ids: (batch, length), of packed rows: they begin at 0 with each document, and
            documents do not attend to each other; see [`coral_hf.training.data.documents`].
        is_detached: whether a step's inputs pass no gradient on to the step before it.

    Returns:
        (steps, batch, length, hidden): at [j, :, t] the step's prediction of feature t + 1. Of a
        branch, the first `num_steps - 1` are not those of its document.

    Raises:
        ValueError: for more steps than the tokens that branches repeat allow.
    """
    is_packed = position_ids is not None
    check_branches(position_ids, num_steps)
    if position_ids is None:
        position_ids = torch.arange(features.shape[1], device=features.device)[None]
    rows, begins = RowAttention(position_ids, is_packed), (position_ids == 0)[..., None]
    seen: Seen = {}
    inputs, predicted = features, []
    for step in range(num_steps):
        context = UnrollContext(step, seen, rows)
        predicted.append(drafter(embeddings, inputs, position_ids, context))
        # the first position has no prediction of its own and keeps the target's feature
        last = predicted[-1].detach() if is_detached else predicted[-1]
        shifted = last.roll(1, dims=1)
        inputs = torch.where(begins, features.to(shifted.dtype), shifted)
    return torch.stack(predicted)


def fits_flex(query: Tensor) -> bool:
    """Whether queries (batch, heads, length, head_dim) go through the kernel, which is Triton's."""
    is_large = query.is_cuda and query.shape[-1] >= LEAST_HEAD_DIM
    return is_large and importlib.util.find_spec("triton") is not None


@cache
def _kernel() -> Callable:
    return torch.compile(flex.flex_attention)


def block_mask(positions: Tensor, lag: int) -> flex.BlockMask:
    """Let each position t see those up to t - lag of its document; positions (batch or 1, length).

    Blocks of keys that no query of a block sees are skipped.
    """
    batch, length = positions.shape
    # what fills the last block is a document of its own
    places = Places.of(pad(positions, (0, -length % BLOCK)))
    shift = torch.tensor(lag, device=positions.device)  # a tensor: one graph for all lags

    def is_seen(row, head, query, key):  # () each
        return places.sees(row % batch, query, key, shift)

    sizes = batch, None, length, length
    return flex.create_block_mask(is_seen, *sizes, str(positions.device), BLOCK_SIZE=BLOCK)
