"""Bytes that operations of torch hold, counted while they run on tensors without data.

In: operations within `FakeTensorMode`, which know shapes and types alone. Out: the bytes that are
alive, and their peak.
"""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until they are released.

    Args:
        models: whose weights, of any shape, are not counted.
    """

    def __init__(self, *models: nn.Module):
        super().__init__()
        self.live = self.peak = 0
        self.at_peak: dict[int, int] = {}  # bytes of each storage that was alive at the peak
        self._alive: dict[int, int] = {}  # bytes of each storage, by its number
        # the number of each storage that is alive, by its address, which a later one may have too
        self._numbers: dict[int, int] = {}
        self._references: list[weakref.ref[UntypedStorage]] = []
        self._left_out = {_address(weight) for model in models for weight in weights(model)}

    def restart(self) -> None:
        """Look for the peak from now on."""
        self.peak, self.at_peak = self.live, dict(self._alive)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        """Run an operation and count what it returns."""
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return output

    def sizes(self, numbers: Iterable[int]) -> dict[int, int]:
        """Return the bytes of storages that are alive, by their number."""
        return {number: self._alive[number] for number in numbers}

    def number_of(self, tensor: Tensor) -> int:
        """Return the number of the storage of a tensor of any shape, which is alive."""
        return self._numbers[_address(tensor)]

    def _count(self, tensor: Tensor) -> None:
        address, storage, number = _address(tensor), tensor.untyped_storage(), len(self._references)
        if address in self._numbers or address in self._left_out:
            return
        self._numbers[address], self._alive[number] = number, storage.nbytes()
        release = partial(self._release, address, number)
        self._references.append(weakref.ref(storage, release))
        self.live += storage.nbytes()
        if self.live > self.peak:
            self.restart()

    def _release(self, address: int, number: int, _: Any) -> None:
        self.live -= self._alive.pop(number)
        del self._numbers[address]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def weights(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a model, of any shape, tied ones once."""
    found = {_address(weight): weight for weight in [*model.parameters(), *model.buffers()]}
    return [*found.values()]


def bytes_of(model: nn.Module) -> int:
    """Count the bytes of a model's weights."""
    return sum(weight.untyped_storage().nbytes() for weight in weights(model))
