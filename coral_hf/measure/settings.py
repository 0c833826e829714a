"""Settings of a benchmark run, recorded in its report."""

from dataclasses import dataclass, field

METHODS = ("plain", "coral", "bigram", "prompt_lookup", "assisted")


@dataclass
class BenchmarkSettings:
    """What is run, how often, and how tokens are chosen."""

    methods: list[str] = field(
        default_factory=lambda: ["plain", "coral"]
    )  # "plain" is the yardstick
    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0  # of sampling, from the whole vocabulary (no top-k, no top-p)
    repeats: int = 1  # timed calls of each method on each prompt
    warmup: int = 1  # untimed calls of each method before them, on the first prompts
    seed: int = 0  # of sampling; repeat r draws with seed + r
    max_turns: int = 1  # user turns of a prompt; later ones follow on the answer of "plain"
    speculation: str = "always"  # "adaptive": what a user gets, who never waits longer than plain
    # keywords of "coral" such as `tree_depth`, `draft_head`, `verification`; else its own settings
    tree: dict[str, int | str] = field(default_factory=dict)
    prompt_lookup_tokens: int = 10  # longest draft of "prompt_lookup"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown or "plain" not in self.methods:
            raise ValueError(
                f"`methods` is {list(self.methods)}; give 'plain', which the others are measured "
                f"against, and any of {', '.join(METHODS[1:])}."
            )
        for name in ("max_new_tokens", "repeats", "max_turns", "prompt_lookup_tokens"):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}; use 1 or more.")
        if self.do_sample and self.temperature <= 0:
            raise ValueError(
                f"`temperature` is {self.temperature}; use a positive one, or `do_sample=False`."
            )
