"""Draft-head fields of a drafter's config: names, choices, and which of them fit together."""

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
# the fields that say which heads there are and how they are read
HEAD_FIELDS = (
    "draft_head",
    "num_groups",
    "num_active_groups",
    "grouping",
    "grouping_hash",
    "routing",
    "max_active_groups",
    "active_mass",
    "is_router_trained",
    "num_hot_tokens",
    "head_rank",
)


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
