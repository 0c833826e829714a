"""Noise on the features that a drafter reads in training (EAGLE, data augmentation).

In: features. Out: features as an imperfect drafter might see them. `Trainer` gives all processes
the same seed, and they must keep it to agree on the order of the data, so the noise has a generator
of its own in each process, whose state a checkpoint holds.
"""

import torch
from torch import Tensor

from ...identity import seed_of


class FeatureNoise:
    """Uniform noise of at most `most`, another in each process.

    Args:
        most: 0 leaves features as they are.
        seed: of the training.
        process: number of the process.
        device: of the features.
    """

    def __init__(self, most: float, seed: int, process: int, device: torch.device):
        self._most = most
        self._generator = torch.Generator(device).manual_seed(seed_of(seed, process))

    def on(self, features: Tensor) -> Tensor:
        """Features (any) with noise."""
        if not self._most:
            return features
        noise = torch.empty_like(features)
        return features + noise.uniform_(-self._most, self._most, generator=self._generator)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the random numbers have come to, for a checkpoint."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        self._generator.set_state(state["generator"])
