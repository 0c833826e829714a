"""What trials came to, one JSON line each, so that a broken comparison goes on where it stopped."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


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

    def append_to(self, path: Path) -> None:
        """Add a line to a file."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self)) + "\n")


def read_results(path: Path) -> list[Result]:
    """The lines of a file; none where there is no file."""
    if not path.exists():
        return []
    return [Result(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
