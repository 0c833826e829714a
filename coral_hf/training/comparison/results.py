"""What trials came to, one JSON line each, so that a broken comparison goes on where it stopped."""

from dataclasses import dataclass
from pathlib import Path

from ..runs.files import JsonLines


@dataclass(frozen=True)
class Result:
    """One training of one trial."""

    trial: str
    seed: int
    steps: int  # of the optimizer
    num_tokens: int  # of the texts that were read
    seconds: float  # of the training
    losses: dict[str, float]  # the last that were logged
    acceptance: dict[str, dict[str, float]]  # temperature → task → τ

    @property
    def mean_acceptance(self) -> float:
        """Over tasks and temperatures."""
        values = [value for tasks in self.acceptance.values() for value in tasks.values()]
        return sum(values) / len(values)


def read_results(path: Path) -> list[Result]:
    """The lines of a file; none where there is no file."""
    return [Result(**fields) for fields in JsonLines(path).read()]
