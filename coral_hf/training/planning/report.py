"""A plan as a user reads it: tables of memory, disk and hours, and what makes a run fit.

In: counted bytes and seconds. Out: a `Plan`, which prints itself and refuses a disk that is full.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...atomic import shown_bytes
from .memory import StepMemory

# of the fields of a StepMemory
MEMORY_NAMES = ["target's weights", "drafter's weights", "optimizer"]
MEMORY_NAMES += ["features of the batches", "activations, gradients"]
VERDICTS = {True: "fits", False: "does not fit"}


class StagePlan(NamedTuple):
    """What a stage of a run takes."""

    stage: str
    num_steps: int
    memory: StepMemory
    checkpoint: int  # bytes of a checkpoint
    num_checkpoints: int  # that lie on the disk together
    seconds: float = 0.0  # of an optimizer step, where it was timed

    @property
    def disk(self) -> int:
        """Bytes of its checkpoints."""
        return self.checkpoint * self.num_checkpoints


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training run takes, and what there is."""

    target: str  # its name, class, parameters and dtype
    rows: str  # how many, and how long
    stages: list[StagePlan]
    room: int  # bytes of memory that a process can have
    room_name: str  # of what
    # what makes the run fit: options that are added, with those before them → memory
    changes: dict[str, StepMemory]
    caches: dict[str, int]  # bytes of a feature cache in each format
    features: str  # "online", "cached" already, or the format to be written
    finished: int  # bytes of the finished drafter
    output: Path
    free: int  # bytes, where the output goes
    existing: int = 0  # bytes that an interrupted run has written there
    cache_seconds: float = 0.0  # of writing the features, where it was timed

    @property
    def largest(self) -> StagePlan:
        """The stage that takes most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def memory(self) -> StepMemory:
        """The memory of that stage."""
        return self.largest.memory

    @property
    def disk(self) -> int:
        """Bytes that the run writes and keeps: checkpoints, drafter, and a feature cache."""
        written = sum(stage.disk for stage in self.stages) + self.finished
        return written + self.caches.get(self.features, 0)

    @property
    def hours(self) -> float | None:
        """Hours of all stages, and of writing features; None where nothing was timed."""
        if not all(stage.seconds for stage in self.stages):
            return None
        steps = sum(stage.seconds * stage.num_steps for stage in self.stages)
        return (steps + self.cache_seconds) / 3600

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice."""
        return self.memory.total <= self.room and self.fits_disk

    @property
    def fits_disk(self) -> bool:
        """Whether the disk suffices."""
        return self.disk - self.existing <= self.free

    def check_disk(self) -> None:
        """Raise a ValueError if the disk cannot hold what the run writes, with what to do."""
        if not self.fits_disk:
            needed, free = shown_bytes(self.disk - self.existing), shown_bytes(self.free)
            raise ValueError(
                f"The run needs {needed} of disk, but only {free} are free at {self.output}; keep"
                " fewer checkpoints (--save_total_limit 1), or compute features while training."
            )

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"Target: {self.target}"
        yield f"Rows: {self.rows}"
        yield f"Memory of a process, at the peak of a step (stage {self.largest.stage!r}):"
        for name, count in zip(MEMORY_NAMES, self.memory, strict=True):
            yield f"  {name:26}{shown_bytes(count):>10}"
        total, verdict = self.memory.total, VERDICTS[self.memory.total <= self.room]
        yield f"  {'together':26}{shown_bytes(total):>10}   {verdict} in {self.room_name}"
        start = "with"
        for options, memory in self.changes.items():
            verdict = VERDICTS[memory.total <= self.room]
            yield f"  {start} {options}: {shown_bytes(memory.total)}, {verdict}"
            start = "and"
        yield "Disk:"
        for stage in self.stages:
            each = f"{stage.num_checkpoints} of {shown_bytes(stage.checkpoint)}"
            yield f"  checkpoints of stage {stage.stage!r}: {each}, {shown_bytes(stage.disk)}"
        yield f"  finished drafter: {shown_bytes(self.finished)}"
        caches = ", ".join(f"{name} {shown_bytes(size)}" for name, size in self.caches.items())
        if caches:
            yield f"  features, if cached (`coral-hf features`): {caches}"
        yield (
            f"  together {shown_bytes(self.disk)} with features {self.features},"
            f" {VERDICTS[self.fits_disk]}: {shown_bytes(self.free)} are free at {self.output}"
        )
        steps = ", ".join(f"{stage.num_steps} in {stage.stage!r}" for stage in self.stages)
        if self.hours is None:
            yield f"Steps: {steps}; no step was timed (--measure)"
        else:
            timed = ", ".join(f"{stage.seconds:.3g} s" for stage in self.stages)
            yield f"Hours: {self.hours:.3g} on this machine; steps: {steps}, each {timed}"
