"""Settings of `time_heads`, recorded in its report."""

from dataclasses import dataclass, field
from typing import NamedTuple

DTYPES = ("float32", "bfloat16", "float16")
GROUPINGS = ("contiguous", "random")


class HeadShape(NamedTuple):
    """An LM head's sizes."""

    name: str
    vocab_size: int
    hidden_size: int


HEAD_SHAPES = {
    shape.name: shape
    for shape in (
        HeadShape("Llama-3-8B", 128256, 4096),
        HeadShape("Qwen2.5-7B", 152064, 3584),
        HeadShape("Gemma-2-2B", 256000, 2304),
    )
}


@dataclass
class HeadTimingSettings:
    """What is timed, and how often; each shape with each dtype, rows, groups and share."""

    shapes: list[HeadShape] = field(default_factory=lambda: list(HEAD_SHAPES.values()))
    dtypes: list[str] = field(default_factory=lambda: ["bfloat16", "float32"])
    rows: list[int] = field(default_factory=lambda: [1, 10])  # of a level of the draft tree
    groups: list[int] = field(default_factory=lambda: [16, 32])
    shares: list[int] = field(default_factory=lambda: [4, 8, 16])  # one group of so many is read
    # "contiguous" or "random": slices of the token ids' own order, or of any, as learned ones are
    grouping: str = "contiguous"
    top_k: int = 10  # children of a row
    repeats: int = 20  # timed calls of each head
    warmup: int = 3  # untimed calls of each before them
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("shapes", "dtypes", "rows", "groups", "shares"):
            if not vars(self)[name]:
                raise ValueError(f"`{name}` is empty; give at least one.")
        for name in ("rows", "groups", "shares"):
            if min(vars(self)[name]) < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}; use values of 1 or more.")
        for name in ("top_k", "repeats"):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}; use 1 or more.")
        if self.warmup < 0:
            raise ValueError(f"`warmup` is {self.warmup}; use 0 or more.")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ValueError(f"`dtypes` holds {dtype!r}; use some of {DTYPES}.")
        if self.grouping not in GROUPINGS:
            raise ValueError(f"`grouping` is {self.grouping!r}; use one of {GROUPINGS}.")
        self._check_sizes()

    def _check_sizes(self) -> None:
        for groups in self.groups:
            for share in self.shares:
                if groups % share:
                    raise ValueError(
                        f"`groups` holds {groups}, of which 1/{share} is no whole number; use"
                        " groups that each of `shares` divides."
                    )
        for shape in self.shapes:
            if shape.hidden_size < 1 or shape.vocab_size < max(*self.groups, self.top_k):
                raise ValueError(
                    f"`shapes` holds {shape.name}, {shape.vocab_size} tokens of"
                    f" {shape.hidden_size} channels; use a vocabulary of at least"
                    f" {max(*self.groups, self.top_k)}, so that no group is empty."
                )
