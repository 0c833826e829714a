"""Averages over trained positions between two log entries, over all processes.

In: sums of each batch, left on their device. Out: one number a name, when an entry is written.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class RunningAverages:
    """Sums and counts by name; nothing is read from the device before `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, totals: dict[str, Tensor], count: int) -> None:
        """Add a batch's sums, () each, over `count` positions."""
        for name, total in totals.items():
            total = total.detach().float()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + count

    def take(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The averages, after which all begins anew.

        Args:
            add_up: sums a tensor over processes, which all must have added the same names.
        """
        if not self._sums:
            return {}
        sums = torch.stack([*self._sums.values()])  # (names,)
        counts = sums.new_tensor([*self._counts.values()])  # (names,)
        names = [*self._sums]
        sums, counts = add_up(torch.stack([sums, counts]))
        self._sums, self._counts = {}, {}
        return dict(zip(names, (sums / counts.clamp(min=1)).tolist(), strict=True))

    def state_dict(self) -> dict[str, dict]:
        """What has been added since the last entry, for a checkpoint."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, dict], device: torch.device) -> None:
        """Go on from a `state_dict`."""
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}
        self._counts = dict(state["counts"])
