"""How features are stored: bf16, or int8 with a scale for each token."""

from typing import NamedTuple

import torch
from torch import Tensor

# bytes of a number, and of what a token has beside its numbers
BYTES = {"bfloat16": (2, 0), "int8": (1, 4)}


class Error(NamedTuple):
    """What storing lost, over all tokens so far."""

    squares: float = 0.0  # of what was lost
    total: float = 0.0  # squares of what was stored
    largest: float = 0.0  # of what was lost

    @property
    def relative(self) -> float:
        """Root mean square of what was lost, as a share of that of the features."""
        return (self.squares / self.total) ** 0.5 if self.total else 0.0

    def and_of(self, features: Tensor, stored: Tensor) -> "Error":
        """With that of more tokens, (tokens, hidden) each."""
        lost = features.double() - stored.double()
        return Error(
            self.squares + float(lost.square().sum()),
            self.total + float(features.double().square().sum()),
            max(self.largest, float(lost.abs().max())),
        )


def encode(features: Tensor, format: str) -> dict[str, Tensor]:
    """(tokens, hidden) → the tensors that are stored."""
    if format == "bfloat16":
        return {"features": features.to(torch.bfloat16).contiguous()}
    scales = features.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return {
        "features": (features.float() / scales).round().to(torch.int8),
        "scales": scales,  # (tokens, 1)
    }


def decode(features: Tensor, scales: Tensor | None) -> Tensor:
    """What `encode` stored → (tokens, hidden)."""
    return features if scales is None else features * scales
