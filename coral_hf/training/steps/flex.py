"""Attention of the unroll on CUDA, by torch's flex attention: packed documents in one call.

In: queries, keys and values of whole rows, and the positions at which documents begin. Out: the
attention of each position, as in `attention.py`. No mask over all keys is made: blocks of keys that
no query of a block may see are skipped, and the mask of the others is computed in the kernel.
"""

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import pad

from ..data.documents import Places
from .attention import KeysValues, merged_attention

BLOCK = 128  # queries, and keys, that are seen or skipped together
LEAST_HEAD_DIM = 16  # of the kernel


def fits_flex(query: Tensor) -> bool:
    """Whether queries (batch, heads, length, head_dim) go through the kernel, which is Triton's."""
    is_there = hasattr(flex, "AuxRequest") and importlib.util.find_spec("triton") is not None
    return is_there and query.is_cuda and query.shape[-1] >= LEAST_HEAD_DIM


class FlexAttention:
    """`mixed_attention` of the rows of a batch; masks are made once for all layers.

    Args:
        positions: (batch or 1, length), which begin at 0 with each document.
    """

    def __init__(self, positions: Tensor):
        self.positions = positions
        self._masks: dict[int, flex.BlockMask] = {}  # by lag

    def __call__(self, query: Tensor, target: KeysValues, own: list[KeysValues]) -> Tensor:
        """Compute `mixed_attention`, shapes too, within each document."""
        return merged_attention(query, target, own, self.positions, self._far)

    def _far(self, query: Tensor, target: KeysValues, lag: int) -> tuple[Tensor, Tensor]:
        """See `FarAttention`; (batch, heads, length, head_dim) and (batch, heads, length)."""
        if lag not in self._masks:
            self._masks[lag] = block_mask(self.positions, lag)
        request = flex.AuxRequest(lse=True)
        mask = self._masks[lag]
        far, aux = _kernel()(query, *target, block_mask=mask, enable_gqa=True, return_aux=request)
        return far, aux.lse


@cache
def _kernel() -> Callable:
    return torch.compile(flex.flex_attention)


def block_mask(positions: Tensor, lag: int) -> flex.BlockMask:
    """Let each position t see those up to t - lag of its document; positions (batch or 1, length).

    Documents of a row follow each other, so blocks are compared by their first and last ones. Of a
    document with branches, those of the other branches are read in vain.
    """
    length = positions.shape[1]
    # (batch or 1, whole blocks), what fills the last block is a document of its own
    places = Places.of(pad(positions, (0, -length % BLOCK)))
    shift = torch.tensor(lag, device=positions.device)  # a tensor: one graph for all lags

    def is_seen(row, head, query, key):  # () each
        return places.sees(row % positions.shape[0], query, key, shift)

    (first, last), (part, end_part) = (
        (where[:, ::BLOCK], where[:, BLOCK - 1 :: BLOCK]) for where in (places.trunk, places.start)
    )  # (batch or 1, blocks)
    start = torch.arange(first.shape[1], device=positions.device) * BLOCK
    end = (start + BLOCK).clamp(max=length) - 1
    # (batch or 1, blocks of queries, blocks of keys)
    is_one = (part == end_part)[:, :, None] & (part == end_part)[:, None]
    is_whole = is_one & (part[:, :, None] == part[:, None]) & (end <= start[:, None] - lag)
    is_shared = (last[:, None] >= first[:, :, None]) & (first[:, None] <= last[:, :, None])
    is_needed = is_shared & (start <= end[:, None] - lag)
    return flex.BlockMask.from_kv_blocks(
        *_listed(is_needed & ~is_whole),
        *_listed(is_whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=is_seen,
        seq_lengths=(length, length),
    )


def _listed(is_read: Tensor) -> tuple[Tensor, Tensor]:
    """List the blocks of keys of each block of queries, (batch or 1, blocks, blocks).

    Returns:
        Their number (batch or 1, 1, blocks), and their indices first, (batch or 1, 1, blocks,
        blocks).
    """
    indices = is_read.int().argsort(dim=-1, descending=True, stable=True)
    return is_read.sum(-1).int()[:, None], indices.int()[:, None].contiguous()
