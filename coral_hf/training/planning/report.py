"""A plan as a user reads it: tables of memory, disk and hours, and what makes a run fit.

In: counted bytes and seconds. Out: a `Plan`, which prints itself and refuses a disk that is full.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...atomic import shown_bytes
from .step_memory import StepMemory

MEMORY_NAMES = {
    "target": "target's weights",
    "drafter": "drafter's weights",
    "optimizer": "optimizer",
    "features": "features of the batches",
    "activations": "activations, gradients",
}


class StagePlan(NamedTuple):
    """What a stage of a run takes."""

    stage: str
    num_steps: int
    memory: StepMemory
    checkpoint: int  # bytes of a checkpoint
    num_checkpoints: int  # that lie on the disk together
    seconds: float | None = None  # of an optimizer step, where it was timed

    @property
    def disk(self) -> int:
        """Bytes of its checkpoints."""
        return self.checkpoint * self.num_checkpoints


class Change(NamedTuple):
    """Options that are added to a run, with those before them, so that it fits."""

    options: str
    memory: StepMemory


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training run takes, and what there is."""

    target: str  # its name, class, parameters and dtype
    rows: str  # how many, and how long
    stages: list[StagePlan]
    room: int  # bytes of memory that a process can have
    room_name: str  # of what
    changes: list[Change]  # none where the run fits
    caches: dict[str, int]  # bytes of a feature cache in each format
    features: str  # "online", "cached" already, or the format to be written
    finished: int  # bytes of the finished drafter
    output: Path
    free: int  # bytes, where the output goes
    existing: int = 0  # bytes that an interrupted run has written there
    cache_seconds: float | None = None  # of writing the features, where it was timed

    @property
    def memory(self) -> StepMemory:
        """The memory of the stage that takes most."""
        return max((stage.memory for stage in self.stages), key=lambda memory: memory.total)

    @property
    def disk(self) -> int:
        """Bytes that the run writes and keeps: checkpoints, drafter, and a feature cache."""
        written = sum(stage.disk for stage in self.stages) + self.finished
        return written + self.caches.get(self.features, 0)

    @property
    def hours(self) -> float | None:
        """Hours of all stages, and of writing features; None where nothing was timed."""
        if any(stage.seconds is None for stage in self.stages):
            return None
        steps = sum((stage.seconds or 0) * stage.num_steps for stage in self.stages)
        return (steps + (self.cache_seconds or 0)) / 3600

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice."""
        return self.memory.total <= self.room and self.disk - self.existing <= self.free

    def check_disk(self) -> None:
        """Raise a ValueError if the disk cannot hold what the run writes, with what to do."""
        if (needed := self.disk - self.existing) > self.free:
            raise ValueError(
                f"The run needs {shown_bytes(needed)} of disk, but only {shown_bytes(self.free)}"
                f" are free at {self.output}; keep fewer checkpoints (--save_total_limit 1),"
                " compute features while training or as int8, or choose another --output."
            )

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"Target: {self.target}"
        yield f"Rows: {self.rows}"
        memory = self.memory
        of = next(stage.stage for stage in self.stages if stage.memory is memory)
        yield f"Memory of a process, at the peak of a step (stage {of!r}):"
        for name, count in memory._asdict().items():
            yield f"  {MEMORY_NAMES[name]:26}{shown_bytes(count):>10}"
        verdict = "fits" if memory.total <= self.room else "does not fit"
        yield f"  {'together':26}{shown_bytes(memory.total):>10}   {verdict} in {self.room_name}"
        for index, change in enumerate(self.changes):
            verdict = "fits" if change.memory.total <= self.room else "does not fit"
            start = "with" if not index else "and"
            yield f"  {start} {change.options}: {shown_bytes(change.memory.total)}, {verdict}"
        yield "Disk:"
        for stage in self.stages:
            each = f"{stage.num_checkpoints} of {shown_bytes(stage.checkpoint)}"
            yield f"  checkpoints of stage {stage.stage!r}: {each}, {shown_bytes(stage.disk)}"
        yield f"  finished drafter: {shown_bytes(self.finished)}"
        caches = ", ".join(f"{name} {shown_bytes(size)}" for name, size in self.caches.items())
        if caches:
            yield f"  features, if cached (`coral-hf features`): {caches}"
        verdict = "fits" if self.disk - self.existing <= self.free else "does not fit"
        yield (
            f"  together {shown_bytes(self.disk)} with features {self.features},"
            f" {verdict}: {shown_bytes(self.free)} are free at {self.output}"
        )
        steps = ", ".join(f"{stage.num_steps} in {stage.stage!r}" for stage in self.stages)
        if self.hours is None:
            yield f"Steps: {steps}; no step was timed (--measure)"
        else:
            timed = ", ".join(f"{stage.seconds or 0:.3g} s" for stage in self.stages)
            yield f"Hours: {self.hours:.3g} on this machine; steps: {steps}, each {timed}"
