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
        """Whether rows of the weight can be read in place.

        Quantised and sharded ones cannot, which are packed integers or subclasses of Tensor, nor
        those of a module that only wraps the one which has the weight and may add to its output.
        """
        weight = dict(self.module.named_parameters(recurse=False)).get("weight")
        if weight is None or type(weight.detach()) is not Tensor:
            return False
        return weight.is_floating_point() and not weight.is_meta

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
        weight = getattr(self.module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return features.to(weight.dtype)
        return features

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

    No part of a module's state: it neither travels with a checkpoint nor with a copy, and goes
    when one of its sources goes. What is written into a source through its `.data` is not seen.
    """

    def __init__(self) -> None:
        self._kept: tuple[list[Stamp], Tensor] | None = None

    def of(self, sources: list[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` makes of `sources`."""
        kept = self._kept
        if kept is None or not all(map(Stamp.is_of, kept[0], sources)):
            stamps = [Stamp.take(source, self._drop) for source in sources]
            # in one assignment, since threads may share a drafter
            self._kept = kept = (stamps, compute())
        return kept[1]

    def _drop(self, source: weakref.ref) -> None:
        """Let go of what was made of a source that is gone."""
        kept = self._kept
        if kept is not None and any(stamp.tensor is source for stamp in kept[0]):
            self._kept = None

    def __reduce__(self):
        return Derived, ()


class Stamp(NamedTuple):
    """What tells a tensor from others, and from itself before it was written to."""

    tensor: weakref.ref
    address: int
    dtype: torch.dtype
    version: int | None

    @classmethod
    def take(cls, tensor: Tensor, at_end: Callable[[weakref.ref], None] | None = None) -> "Stamp":
        """The stamp of a tensor, at whose end `at_end` is called."""
        version = None if tensor.is_inference() else tensor._version
        return cls(weakref.ref(tensor, at_end), tensor.data_ptr(), tensor.dtype, version)

    def is_of(self, tensor: Tensor) -> bool:
        """Whether it is this tensor's, as it is now."""
        # compared one by one: references to living tensors compare their numbers
        return self.tensor() is tensor and self[1:] == Stamp.take(tensor)[1:]
