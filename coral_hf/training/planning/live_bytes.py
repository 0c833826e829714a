"""Bytes that operations of torch hold, counted while they run on tensors without data.

In: operations within `FakeTensorMode`, which know shapes and types alone. Out: the bytes that are
alive, and their peak.
"""

import weakref
from typing import Any

from torch import Tensor, nn
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
        # addresses of storages that are alive, and of those that are not counted
        self._known = {_address(weight) for model in models for weight in weights(model)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        """Run an operation and count what it returns."""
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and _address(tensor) not in self._known:
                storage, address = tensor.untyped_storage(), _address(tensor)
                self._known.add(address)
                weakref.finalize(storage, self._release, address, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return output

    def _release(self, address: int, size: int) -> None:
        self.live -= size
        self._known.remove(address)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def weights(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a model, of any shape, tied ones once."""
    found = {_address(weight): weight for weight in [*model.parameters(), *model.buffers()]}
    return [*found.values()]


def bytes_of(model: nn.Module) -> int:
    """Count the bytes of a model's weights."""
    return sum(map(size_of, weights(model)))


def size_of(tensor: Tensor) -> int:
    """Count the bytes of the storage of a tensor of any shape."""
    return tensor.untyped_storage().nbytes()
