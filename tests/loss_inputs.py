"""Features and a head of small sizes for the tests of the losses."""

import torch
from torch import Tensor, nn

from coral_hf.lm_head import LMHead

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
