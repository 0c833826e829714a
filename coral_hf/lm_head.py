"""A target's LM head as a draft head reads it: whole, by rows, and what was derived from it.

In: the target's output module. Out: logits as the target computes them, of all tokens or of some.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes; accelerate leaves an offloaded one's weight on no real device."""
    device = module.weight.device
    hook = getattr(module, "_hf_hook", None)
    return torch.device(hook.execution_device) if device.type == "meta" and hook else device


class LMHead(NamedTuple):
    """A target's LM head and what the target does to its output."""

    module: nn.Module  # (..., hidden) → (..., vocab)
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:
        """(vocab, hidden)"""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """(vocab,), for the heads that have one."""
        return getattr(self.module, "bias", None)

    @property
    def is_readable(self) -> bool:
        """Whether rows of the weight can be read in place: quantised or sharded ones cannot."""
        weight = self.weight
        # those are packed integers, or subclasses of Tensor
        is_plain = isinstance(weight, Tensor) and type(weight.detach()) is Tensor
        return is_plain and weight.is_floating_point() and not weight.is_meta

    def logits(self, features: Tensor) -> Tensor:
        """(..., hidden) → (..., vocab): exactly what the target computes of these features."""
        return self.finish(self.module(self.cast(features)))

    def logits_of(self, features: Tensor, weight: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(..., any) → (..., rows): logits from a weight that stands in for the head's own.

        Args:
            features: (..., any), as wide as the weight.
            weight: (rows, any).
            tokens: (rows,), the token of each row; all tokens by default.
        """
        bias = self.bias if self.bias is None or tokens is None else self.bias[tokens]
        return self.finish(F.linear(features.to(weight.dtype), weight, bias))

    def cast(self, features: Tensor) -> Tensor:
        """Features (any) in the dtype that the head computes in; a quantised head takes any."""
        weight = self.weight
        is_float = isinstance(weight, Tensor) and weight.is_floating_point()
        return features.to(weight.dtype) if is_float else features

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap raw logits (..., any) as the target does; -inf stays -inf."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            capped = torch.tanh(logits / self.softcap) * self.softcap
            logits = capped.masked_fill(logits == float("-inf"), float("-inf"))
        return logits


class Derived:
    """A tensor computed from others, computed again only when one of them has changed.

    No part of a module's state: it neither travels with a checkpoint nor with a copy.
    """

    def __init__(self) -> None:
        self._kept: tuple[list[tuple], Tensor] | None = None

    def of(self, sources: list[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` makes of `sources`."""
        kept, stamps = self._kept, [_stamp(source) for source in sources]
        if kept is None or kept[0] != stamps:
            # in one assignment, since threads may share a drafter
            self._kept = kept = (stamps, compute())
        return kept[1]

    def __reduce__(self):
        return Derived, ()


def _stamp(tensor: Tensor) -> tuple:
    """What changes when a tensor is another one, or is written to."""
    version = None if tensor.is_inference() else tensor._version
    return weakref.ref(tensor), tensor.data_ptr(), tensor.dtype, version
