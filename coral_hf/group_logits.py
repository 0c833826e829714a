"""Logits of the active groups of an LM head, plain form."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .router import UNUSED


def has_kernel(weight: Tensor) -> bool:
    """Whether rows of this weight can be read through an order without a copy."""
    return False


def group_logits(
    features: Tensor,
    weight: Tensor,
    active: Tensor,
    size: int,
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Raw logits of the active groups, in fp32; -inf where there is no token.

    Args:
        features: (texts, rows, hidden), in the weight's dtype.
        weight: (vocab, hidden).
        active: (texts, 1 or rows, slots), groups; `UNUSED` for none.
        size: tokens of a group.
        bias: (vocab,), in the order of the weight's rows.
        order: (vocab,), which row of the weight stands at each place of the groups; the rows' own
            order by default.

    Returns:
        (texts, rows, slots, size)
    """
    texts, rows, _ = features.shape
    out = features.new_full(
        (texts, rows, active.shape[2], size), float("-inf"), dtype=torch.float32
    )
    for text, chosen in enumerate(active.tolist()):
        for row, groups in enumerate(chosen):
            who = slice(None) if len(chosen) == 1 else slice(row, row + 1)
            for slot, group in enumerate(groups):
                if group == UNUSED:
                    continue
                part = slice(group * size, min((group + 1) * size, weight.shape[0]))
                places = part if order is None else order[part]
                block = F.linear(
                    features[text, who], weight[places], None if bias is None else bias[places]
                )
                out[text, who, slot, : block.shape[-1]] = block
    return out
