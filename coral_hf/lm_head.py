"""A target's LM head as draft heads read it, and tensors cached from its weight.

In: the target's output module. Out: logits exactly as the target computes them, of all tokens or
of some rows or channels of the weight.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def execution_device(module: nn.Module) -> torch.device:
    """Return the device a module computes on; an offloaded weight itself is on the meta device."""
    device = module.weight.device
    hook = getattr(module, "_hf_hook", None)
    return torch.device(hook.execution_device) if device.type == "meta" and hook else device


class LMHead(NamedTuple):
    """A target's LM head and what the target does to its output."""

    module: nn.Module  # (*batch, hidden) → (*batch, vocab)
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:
        """The module's weight, (vocab, hidden)."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """The module's bias, of shape (vocab,), or None."""
        return getattr(self.module, "bias", None)

    @property
    def is_readable(self) -> bool:
        """Whether rows of the weight (vocab, hidden) can be read in place.

        Quantised and sharded weights cannot: they are packed integers or subclasses of Tensor. Nor
        can a module that wraps the one with the weight, since it may add to its output.
        """
        weight = dict(self.module.named_parameters(recurse=False)).get("weight")
        if weight is None or type(weight.detach()) is not Tensor:
            return False
        return weight.is_floating_point() and not weight.is_meta

    def logits(self, features: Tensor) -> Tensor:
        """Compute the target's logits, (*batch, vocab), of features (*batch, hidden)."""
        return self.finish(self.module(self.cast(features)))

    def logits_from(self, features: Tensor, weight: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Compute logits with a weight that stands in for the head's own.

        Args:
            features: (*batch, width), as wide as the weight.
            weight: (rows, width).
            tokens: the token id of each row, of shape (rows,); all tokens by default.

        Returns:
            (*batch, rows)
        """
        bias = self.bias if self.bias is None or tokens is None else self.bias[tokens]
        return self.finish(F.linear(features.to(weight.dtype), weight, bias))

    def cast(self, features: Tensor) -> Tensor:
        """Cast features (*batch, hidden) to the weight's dtype; a quantised head takes any."""
        weight = getattr(self.module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return features.to(weight.dtype)
        return features

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap raw logits (*batch, vocab) as the target does; -inf stays -inf."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            capped = torch.tanh(logits / self.softcap) * self.softcap
            logits = capped.masked_fill(logits == float("-inf"), float("-inf"))
        return logits


class CachedTensor:
    """A tensor computed from others, computed again only when one of them has changed.

    It is not part of a module's state: it is neither saved nor copied with the module, and is freed
    with the first of its sources that is. A write through a source's `.data` goes unnoticed.
    """

    def __init__(self) -> None:
        self._cached: tuple[list[TensorVersion], Tensor] | None = None

    def get(self, sources: list[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """Return `compute()`, of any shape, from the cache where `sources` are unchanged."""
        cached = self._cached
        if cached is None or not all(map(TensorVersion.matches, cached[0], sources)):
            versions = [read_version(source, self._drop) for source in sources]
            # in one assignment, since threads may share a drafter
            self._cached = cached = (versions, compute())
        return cached[1]

    def _drop(self, source: weakref.ref) -> None:
        """Free the tensor when one of its sources is freed."""
        cached = self._cached
        if cached is not None and any(version.tensor is source for version in cached[0]):
            self._cached = None

    def __reduce__(self):
        return CachedTensor, ()


class TensorVersion(NamedTuple):
    """What tells a tensor of any shape from others, and from itself before it was written to."""

    tensor: weakref.ref
    address: int
    dtype: torch.dtype
    version: int | None

    def matches(self, tensor: Tensor) -> bool:
        """Whether `tensor`, of any shape, is the tensor of this version, unchanged since."""
        # compared one by one: references to living tensors compare their numbers
        return self.tensor() is tensor and self[1:] == read_version(tensor)[1:]


def read_version(
    tensor: Tensor, when_freed: Callable[[weakref.ref], None] | None = None
) -> TensorVersion:
    """Read the version of a tensor of any shape; `when_freed` is called when it is freed."""
    version = None if tensor.is_inference() else tensor._version
    return TensorVersion(weakref.ref(tensor, when_freed), tensor.data_ptr(), tensor.dtype, version)
