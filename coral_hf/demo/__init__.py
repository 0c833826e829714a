"""Settings of the demo, which trains and measures a target, a drafter and its router.

[`~coral_hf.demo.run.run_demo`] takes them. No network is needed: the target learns stories that
are made up from phrases. This file imports no torch, since `coral-hf demo --help` reads it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..measure.settings import option


class Budget(NamedTuple):
    """How long a training run may take: the limit that is reached first ends it."""

    max_steps: int
    max_seconds: float


@dataclass(frozen=True)
class DemoSettings:
    """What the demo trains, and on what it measures.

    Args:
        num_stories: that are trained on.
        max_length: tokens of a training row at most.
        pad_layers: depth of the padded target.
        tree: depth, top-k and nodes of what is drafted.
    """

    output: Path = option("Folder of models and reports.", Path("coral-demo"))
    compile: bool = option("Compile the rounds of the padded target.", True)
    # in Python alone
    num_stories: int = 8000
    target_budget: Budget = Budget(max_steps=10_000, max_seconds=60)
    drafter_budget: Budget = Budget(max_steps=4000, max_seconds=70)
    router_budget: Budget = Budget(max_steps=1000, max_seconds=12)
    max_length: int = 256
    pad_layers: int = 8
    tree: tuple[int, int, int] = (5, 4, 16)
    num_prompts: int = 2
    max_new_tokens: int = 160
    seed: int = 0
