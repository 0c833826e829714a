"""A target's LM head as draft heads read it, and a cache of what is computed from its weight.

In: the target's output module. Out: logits exactly as the target computes them, of all tokens or
of some rows of the weight.
"""

from collections.abc import Callable
from operator import is_not
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

Value = TypeVar("Value")


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


class Cached(Generic[Value]):
    """What was computed from some tensors, computed again only when one of them has changed.

    It is not part of a module's state: it is neither saved nor copied with the module, and is freed
    with the first of its sources. A write through a source's `.data` goes unnoticed.
    """

    def __init__(self) -> None:
        # by the first source: the state of all, the others themselves, the value
        self._cached = WeakTensorKeyDictionary()

    def get(self, sources: list[Tensor], compute: Callable[[], Value]) -> Value:
        """Return `compute()`, from the cache where `sources`, of any shape, are unchanged."""
        first, *others = sources
        state = [(source.data_ptr(), source.dtype, _version(source)) for source in sources]
        cached = self._cached.get(first)
        if cached is None or cached[0] != state or any(map(is_not, cached[1], others)):
            self._cached.clear()
            # threads may share a drafter: what is returned is what was computed here
            self._cached[first] = cached = (state, others, compute())
        return cached[2]

    def __reduce__(self):
        return Cached, ()


def _version(tensor: Tensor) -> int | None:
    """How often a tensor of any shape was written to; not counted for those of inference mode."""
    return None if tensor.is_inference() else tensor._version
