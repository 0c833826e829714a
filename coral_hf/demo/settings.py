"""Settings of the demo: what is trained for how long, what is measured, where the results go."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Budget:
    """How long a training may last: what is reached first ends it."""

    max_steps: int
    max_seconds: float

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_seconds"):
            if vars(self)[name] <= 0:
                raise ValueError(f"`{name}` is {vars(self)[name]}; use a value above 0.")


@dataclass(frozen=True)
class OwnTarget:
    """The small target that the demo trains itself; the defaults suit two CPU cores."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 352
    num_layers: int = 2
    num_heads: int = 4
    num_files: int | None = None  # of the standard library; None for all
    budget: Budget = Budget(max_steps=10_000, max_seconds=150)
    learning_rate: float = 4e-3


@dataclass(frozen=True)
class DemoSettings:
    """Everything that `run_demo` can be told.

    Args:
        target: a folder or hub id of a causal language model; None for the demo's own.
        dataset: conversations or text to train the drafter on, as `load_conversations` takes them;
            None for the standard library's source.
        output: where the drafter, the reports and the picture go.
        cache_dir: where trained models are kept; a folder in Hugging Face's own cache if None.
        fresh: train again what the cache holds.
    """

    target: str | None = None
    dataset: str | None = None
    output: Path = Path("coral-demo")
    cache_dir: Path | None = None
    fresh: bool = False
    own_target: OwnTarget = OwnTarget()
    drafter_budget: Budget = Budget(max_steps=3000, max_seconds=95)
    router_budget: Budget = Budget(max_steps=1000, max_seconds=12)
    row_length: int = 256  # tokens of a training row
    batch_size: int = 4  # rows; large logits are slow to allocate on a CPU
    drafter_batch_size: int = 2  # more steps in the same time
    pad_layers: int = 32  # depth of the padded target; a deeper one is measured as it is
    num_prompts: int = 5
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "row_length",
            "batch_size",
            "drafter_batch_size",
            "num_prompts",
            "max_new_tokens",
        ):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}; use 1 or more.")
