"""Settings of a sweep, recorded in its report."""

from dataclasses import dataclass, field


@dataclass
class SweepSettings:
    """What is swept, and how often each is measured; tokens are chosen greedily."""

    batch_sizes: list[int] = field(default_factory=list)  # rows of a batch
    contexts: list[int] = field(default_factory=list)  # tokens of one row's prompt
    max_new_tokens: int = 128
    repeats: int = 3  # timed calls of each method on each batch
    warmup: int = 1  # untimed calls of each method before those of each size
    # `tree_depth`, `tree_top_k`, `tree_nodes`, `draft_head`, else the drafter's own
    tree: dict[str, int | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.batch_sizes and not self.contexts:
            raise ValueError("`batch_sizes` and `contexts` are both empty; give one of them.")
        for name in ("batch_sizes", "contexts"):
            if min(vars(self)[name], default=1) < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}; use values of 1 or more.")
        if self.max_new_tokens < 2:
            raise ValueError(
                f"`max_new_tokens` is {self.max_new_tokens}; use 2 or more: the first token comes"
                " with the prompt's pass."
            )
        if self.repeats < 1:
            raise ValueError(f"`repeats` is {self.repeats}; use 1 or more.")
