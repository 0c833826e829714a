"""Settings of the measuring commands.

In: what a user chooses. Out: checked dataclasses, which reports record. The command line makes an
option of each field with a help text, so this file imports neither torch nor transformers.
"""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

Method = Literal["plain", "coral", "prompt_lookup", "assisted"]
METHODS = get_args(Method)
Head = Literal["full", "quantized", "routed", "frequency"]
Rule = Literal["token", "traversal", "block"]
SAMPLING_ALONE = ("verification", "drawn_tree")
TREE = ("tree_depth", "tree_top_k", "tree_nodes")
DRAFTING = (*TREE, "draft_head", "draft_window", "cache_implementation", *SAMPLING_ALONE)


def option(help: str, default: Any = MISSING, **metadata: Any) -> Any:
    """Make a dataclass field with a help text.

    Metadata: `least`, its lower bound; `flag`, the option's name; `needs` and `excludes`, names of
    other fields that it goes with and does not go with; `positional`, an argument without a name.
    """
    metadata["help"] = help
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_least(settings: Any) -> None:
    """Raise a ValueError for the first field of settings that is below its lower bound."""
    for one in fields(settings):
        least, value = one.metadata.get("least"), vars(settings)[one.name]
        if least is not None and value is not None:
            values = value if isinstance(value, list) else [value]
            if not all(least <= number for number in values):  # which NaN is not
                raise ValueError(f"`{one.name}` is {value}; use {least} or more.")


@dataclass(kw_only=True)
class TreeSettings:
    """The shape of draft trees; None leaves it to the drafter's own settings."""

    tree_depth: int | None = option("Levels of the draft tree.", None)
    tree_top_k: int | None = option("Children of an expanded node; 1 drafts chains.", None)
    tree_nodes: int | None = option("Nodes that the target verifies, root included.", None)

    def __post_init__(self) -> None:
        check_least(self)

    def drafting(self) -> dict[str, Any]:
        """Return the keywords of `generate` for a drafter that were chosen."""
        own = vars(self)
        return {name: own[name] for name in DRAFTING if own.get(name) is not None}


@dataclass(kw_only=True)
class DraftingSettings(TreeSettings):
    """How tokens are drafted and verified, and how rounds are run."""

    draft_head: Head | None = option("Draft head; the drafter's own by default.", None)
    cache_implementation: Literal["static"] | None = option("Rounds of constant shapes.", None)
    compile: bool = option("Compile them, with torch's own defaults.", False)
    verification: Rule | None = option("Rule of acceptance when sampling.", None)
    drawn_tree: bool | None = option("When sampling, draw the tree's tokens at random.", None)
    draft_window: int | None = option("Tokens that the drafter attends to.", None)

    def drafting(self) -> dict[str, Any]:
        """Return the keywords of `generate` for a drafter that were chosen."""
        chosen = super().drafting()
        if self.compile:
            from transformers import CompileConfig

            chosen["compile_config"] = CompileConfig(mode="default")
        return chosen


@dataclass(kw_only=True)
class BenchmarkSettings(DraftingSettings):
    """What a benchmark runs, how often, and how tokens are chosen."""

    # "plain" is what the others are measured against
    methods: list[Method] = option("What is compared.", ["plain", "coral"], flag="method")
    max_new_tokens: int = option("Tokens of each answer.", 128, least=1)
    temperature: float = option("0 is greedy.", 0.0, least=0)
    repeats: int = option("Timed calls of each method on each prompt.", 1, least=1)
    warmup: int = option("Untimed calls of each method before them.", 1, least=0)
    seed: int = option("Seed of sampling; repeat r draws with seed + r.", 0)
    max_turns: int = option("User turns; each follows the target's own answer.", 1, least=1)
    speculation: Literal["always", "adaptive"] = option("Draft always, or where it pays.", "always")

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.methods) - set(METHODS) or "plain" not in self.methods:
            raise ValueError(f"`methods` is {self.methods}; give 'plain' and any of {METHODS[1:]}.")


@dataclass(kw_only=True)
class VerifySettings(DraftingSettings):
    """How much is compared, and the sampling settings whose distribution is tested."""

    max_new_tokens: int = option("Tokens of each greedy answer.", 64, least=2)
    temperature: float | None = option("Of samples; the target's own by default, or 1.", None)
    top_p: float | None = option("Of samples; the target's own by default, or 1.", None)
    top_k: int | None = option("Of samples; the target's own by default, or 0 for all.", None)
    num_samples: int = option("Samples of each sampled prompt.", 2000, flag="samples", least=100)
    sampled_prompts: int = option("Of the first prompts, so many are sampled from.", 2, least=0)
    batch_size: int = option("Samples that are drawn at once.", 32, least=1)
    seed: int = option("Seed of sampling.", 0)

    def sampling(self, own: Any) -> dict[str, float]:
        """Return the sampling settings, where none were chosen those of a generation config."""
        found: dict[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        for place in (own, self):
            given = {name: getattr(place, name) for name in found}
            found |= {name: value for name, value in given.items() if value is not None}
        return found

    def shape(self) -> dict[str, Any]:
        """Return the keywords of `generate` for a drafter that a greedy call takes too."""
        chosen = self.drafting()
        return {name: chosen[name] for name in chosen if name not in SAMPLING_ALONE}


@dataclass(kw_only=True)
class ComparisonSettings(TreeSettings):
    """What all trials of a comparison share."""

    output: Path = option("Folder of the results; resumed if it has some.")
    # arguments of CoralTrainingArguments, as on a command line
    options: list[str] = field(default_factory=list)
    temperatures: list[float] = option("Measured at.", [0.0, 1.0], flag="temperature", least=0)
    # a round of decoding follows the token of the prefill
    max_new_tokens: int = option("Tokens of each answer.", 64, least=2)
    batch_size: int = option("Prompts that are answered at once.", 8, least=1)
