"""Draft-head fields of a drafter's config: names, choices, and which of them fit together."""

from dataclasses import dataclass, fields

from transformers import PreTrainedConfig

DRAFT_HEADS = ("full", "quantized", "routed", "frequency")
UNTRAINED_HEADS = ("full", "quantized")  # which every drafter has
GROUPINGS = ("contiguous", "kmeans", "frequency", "custom")
ROUTINGS = ("shared", "per_node")

HEAD_SIZES = {"routed": "num_groups", "frequency": "num_hot_tokens"}  # what a draft head needs


@dataclass
class HeadFields:
    """Fields of the config of a drafter with draft heads: which it has, and how they are read.

    Args:
        draft_head: `"full"` reads the whole LM head, `"quantized"` a copy of it in eight bits,
            `"routed"` the groups that the router picks, `"frequency"` the most frequent tokens.
        num_groups: groups of the router, `None` for a drafter without one.
        num_active_groups: groups that a routed head reads at a time.
        grouping: what the groups were made from; all but `"contiguous"` have an order of the
            vocabulary in the checkpoint.
        grouping_hash: of that order; a router knows its own groups only.
        routing: whether the nodes of a tree level share groups (`"shared"`), or read each its own
            (`"per_node"`).
        active_mass: read only as many groups as hold this share of the router's mass; `None`
            always reads `num_active_groups`.
        is_router_trained: whether the router has been trained; only then is it read.
        num_hot_tokens: tokens of the frequency head, `None` for a drafter without one.
    """

    draft_head: str = "full"
    num_groups: int | None = None
    num_active_groups: int = 2
    grouping: str = "contiguous"
    grouping_hash: str | None = None
    routing: str = "shared"
    active_mass: float | None = None
    is_router_trained: bool = False
    num_hot_tokens: int | None = None


HEAD_FIELDS = tuple(field.name for field in fields(HeadFields))


def check_sizes(config: PreTrainedConfig, least: int, most: int | None, *names: str) -> None:
    """Raise a ValueError for a field that is set, and not to a value from `least` to `most`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value <= (value if most is None else most):
            limit = "or more" if most is None else f"to {most}"
            raise ValueError(f"`{name}` is {value}; use {least} {limit}.")


def check_head_fields(config: PreTrainedConfig) -> None:
    """Raise a ValueError if the draft-head fields of a drafter's config do not fit together."""
    choices = {"draft_head": DRAFT_HEADS, "grouping": GROUPINGS, "routing": ROUTINGS}
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"`{name}` is {getattr(config, name)!r}; use one of {allowed}.")
    needed = HEAD_SIZES.get(config.draft_head)
    if needed is not None and getattr(config, needed) is None:
        raise ValueError(f"`draft_head` is {config.draft_head!r}, but `{needed}` is None; set it.")
    check_sizes(config, 1, config.vocab_size, "num_groups", "num_hot_tokens")
    check_sizes(config, 1, config.num_groups, "num_active_groups")
    mass = config.active_mass
    if mass is not None and not 0 < mass <= 1:
        raise ValueError(f"`active_mass` is {mass}; use a share above 0, at most 1, or None.")
    is_ordered = config.grouping != "contiguous"
    if config.num_groups is not None and is_ordered == (config.grouping_hash is None):
        raise ValueError(
            f"`grouping` is {config.grouping!r} and `grouping_hash` {config.grouping_hash}: all but"
            " 'contiguous' come with an order of the vocabulary. Leave both out, and call"
            " drafter.heads.add_router(...) or train with `stage` 'router' and a `grouping`."
        )
