"""What a call of `generate` with a drafter did: rounds, accepted tokens, where the time went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class DecodingStats:
    """Counts and seconds of one call.

    The pass over the prompt and the token it gives belong to no round.
    """

    # tokens that each round emitted, row after row in a batch
    round_lengths: list[int] = field(default_factory=list)
    num_rounds: int = 0  # passes of the target over trees, each over all rows that go on
    num_levels: int = 0  # that were drafted, over all rounds; none in a plain round
    num_nodes: int = 0  # of a row, the root included, over all rounds
    is_stepped_back: bool = False  # whether drafting was given up, since it did not pay
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0

    @property
    def acceptance_length(self) -> float:
        """τ: tokens of a row per target pass, of the rounds; 0 if there was none."""
        return sum(self.round_lengths) / len(self.round_lengths) if self.round_lengths else 0.0

    @property
    def round_seconds(self) -> float:
        """Of all rounds, without the pass over the prompt."""
        return self.draft_seconds + self.verify_seconds + self.other_seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of a `with` block to `prefill`, `draft`, `verify` or `other`."""
        start = time.perf_counter()
        yield
        name = f"{stage}_seconds"
        setattr(self, name, getattr(self, name) + time.perf_counter() - start)
