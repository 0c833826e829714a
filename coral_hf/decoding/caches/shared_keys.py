"""Attention of a tree's nodes to a cache whose keys several heads share, without copies of them.

In: queries of a tree, keys and values, an additive mask. Out: what `sdpa` gives. transformers
repeats the keys and values of a layer for each query head where there is a mask, so that a pass
would hold many times a layer's cache; here the nodes of the heads that share keys stand in one row.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SDPA = "sdpa"
ALTERING = ("position_bias", "softcap", "s_aux")  # arguments that change the scores


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None
) -> Tensor:
    """Attend with a mask, without a copy of the keys: (batch, heads, new, head_dim).

    Args:
        query: (batch, heads, new, head_dim).
        key, value: (batch, kv_heads, slots, head_dim).
        mask: (batch, 1, new, slots), added to the scores.
        scale: of the scores; by default that of `head_dim`.
    """
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or query.device.type == "cpu":  # whose kernel shares keys by itself
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=groups > 1
        )
    return attend_packed(query, key, value, mask, scale)


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None
) -> Tensor:
    """[`attend`] with the nodes of all heads that share keys side by side, as of one head."""
    packed = query.reshape(*key.shape[:2], -1, query.shape[3])  # (batch, kv, groups · new, dim)
    mask = mask.repeat(1, 1, query.shape[1] // key.shape[1], 1)
    attended = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
    return attended.reshape(*query.shape[:3], -1)


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, by [`attend`] where a layer reads a tree; shapes are those of it."""
    mask, size = attention_mask, (1, query.shape[2], key.shape[2])
    is_plain = all(kwargs.get(name) is None for name in ALTERING) and not module.training
    if mask is None or mask.shape[1:] != size or query.shape[1] == key.shape[1] or not is_plain:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    return attend(query, key, value, mask, scaling).transpose(1, 2).contiguous(), None


@contextmanager
def sharing_keys() -> Iterator[None]:
    """Let a pass over a tree attend by [`attend`] where its layers use transformers' `sdpa`.

    A function that somebody has put in its place stays. Other threads' passes meanwhile may attend
    so too, which gives the same.
    """
    if ALL_ATTENTION_FUNCTIONS[SDPA] is not sdpa_attention_forward:
        yield
        return
    ALL_ATTENTION_FUNCTIONS[SDPA] = _sdpa
    try:
        yield
    finally:
        with suppress(KeyError):  # another thread was faster
            del ALL_ATTENTION_FUNCTIONS[SDPA]
