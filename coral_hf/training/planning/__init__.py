"""A plan before a run: memory, disk and hours of a training run, before anything is loaded.

[`~coral_hf.training.planning.plan.plan`] takes these settings. This file imports no torch, since
`coral-hf plan --help` reads it.
"""

from dataclasses import dataclass
from typing import Literal

from ...measure.settings import check_least, option


@dataclass(frozen=True)
class PlanSettings:
    """What a run is planned for.

    Raises:
        ValueError: for a value out of range.
    """

    gpu_memory: float | None = option("GiB of the GPU; else what this machine has.", None, least=1)
    target_bits: Literal["4", "8"] | None = option("Plan with a quantized target.", None)
    lora_rank: int | None = None  # of an adapter that is trained in place of the drafter
    features: Literal["online", "bfloat16", "int8"] = option(
        "Compute features while training, or cache them in this format.", "online"
    )
    measure: bool | None = option(
        "Time a few steps; by default where the target is a small folder.", None
    )

    def __post_init__(self) -> None:
        check_least(self)
