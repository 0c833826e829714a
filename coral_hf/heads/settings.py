"""Draft-head fields of a drafter's config: names, choices, and which of them fit together."""

from dataclasses import dataclass, fields

from transformers import PreTrainedConfig

DRAFT_HEADS = ("full", "quantized", "routed", "routed_quantized", "frequency", "low_rank")
UNTRAINED_HEADS = ("full", "quantized")  # which every drafter has
GROUPINGS = ("contiguous", "kmeans", "frequency", "coactivation", "custom")
ROUTINGS = ("shared", "union", "per_node")

# the field that a draft head needs
HEAD_SIZES = {
    "routed": "num_groups",
    "routed_quantized": "num_groups",
    "frequency": "num_hot_tokens",
    "low_rank": "head_rank",
}
# size → the field that is its largest value
SIZE_LIMITS = {
    "num_groups": "vocab_size",
    "num_hot_tokens": "vocab_size",
    "head_rank": "hidden_size",
    "num_active_groups": "num_groups",
    "max_active_groups": "num_groups",
}


@dataclass
class HeadFields:
    """Fields of the config of a drafter with draft heads: which it has, and how they are read.

    Args:
        draft_head: `"full"` reads the whole LM head, `"quantized"` a copy of it in eight bits,
            `"routed"` the groups that the router picks, `"routed_quantized"` these in eight bits,
            `"frequency"` the most frequent tokens, `"low_rank"` a few channels of all tokens.
        num_groups: groups of the router, `None` for a drafter without one.
        num_active_groups: groups that a routed head reads at a time.
        grouping: what the groups were made from; all but `"contiguous"` have an order of the
            vocabulary in the checkpoint.
        grouping_hash: of that order; a router knows its own groups only.
        routing: whether the rows of a tree level share groups (`"shared"`), all read what any of
            them wants (`"union"`), or read each its own (`"per_node"`).
        max_active_groups: groups that `"union"` reads for a text at most; `None` for all wanted.
        active_mass: read only as many groups as hold this share of the router's mass; `None`
            always reads `num_active_groups`.
        is_router_trained: whether the router has been trained; only then is it read.
        num_hot_tokens: tokens of the frequency head, `None` for a drafter without one.
        head_rank: channels of the low-rank head, `None` for a drafter without one.
    """

    draft_head: str = "full"
    num_groups: int | None = None
    num_active_groups: int = 2
    grouping: str = "contiguous"
    grouping_hash: str | None = None
    routing: str = "shared"
    max_active_groups: int | None = None
    active_mass: float | None = None
    is_router_trained: bool = False
    num_hot_tokens: int | None = None
    head_rank: int | None = None


HEAD_FIELDS = tuple(field.name for field in fields(HeadFields))


def check_head_fields(config: PreTrainedConfig) -> None:
    """Raise a ValueError if the draft-head fields of a drafter's config do not fit together."""
    choices = {"draft_head": DRAFT_HEADS, "grouping": GROUPINGS, "routing": ROUTINGS}
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"`{name}` is {getattr(config, name)!r}; use one of {allowed}.")
    needed = HEAD_SIZES.get(config.draft_head)
    if needed is not None and getattr(config, needed) is None:
        raise ValueError(f"`draft_head` is {config.draft_head!r}, but `{needed}` is None; set it.")
    for name, limit in SIZE_LIMITS.items():
        value, most = getattr(config, name), getattr(config, limit)
        if value is not None and most is not None and not 1 <= value <= most:
            raise ValueError(f"`{name}` is {value}; use a value from 1 to `{limit}` = {most}.")
    if config.active_mass is not None and not 0 < config.active_mass <= 1:
        raise ValueError(
            f"`active_mass` is {config.active_mass}; use a share above 0, at most 1, or None."
        )
    has_router, is_ordered = config.num_groups is not None, config.grouping != "contiguous"
    if has_router and is_ordered == (config.grouping_hash is None):
        raise ValueError(
            f"`grouping` is {config.grouping!r} and `grouping_hash` {config.grouping_hash}: all"
            " groupings but 'contiguous' come with an order of the vocabulary. Leave both out"
            " and call drafter.heads.add_router(num_groups, num_active_groups, order), or train"
            " with CoralTrainingArguments(stage='router', grouping=...)."
        )
    if has_router and config.max_active_groups is not None and config.routing != "union":
        raise ValueError(
            f"`max_active_groups` is {config.max_active_groups}, which is for routing='union',"
            f" but `routing` is {config.routing!r}; leave it out."
        )
