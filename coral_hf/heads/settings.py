"""Draft-head fields of a drafter's config: names, choices, and which of them fit together."""

from transformers import PreTrainedConfig

DRAFT_HEADS = ("full", "routed", "frequency", "low_rank")
GROUPINGS = ("contiguous", "kmeans", "frequency", "coactivation", "custom")
ROUTINGS = ("shared", "union", "per_node")

# the field that a draft head needs
HEAD_SIZES = {"routed": "num_groups", "frequency": "num_hot_tokens", "low_rank": "head_rank"}
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
    _check_size(config, "num_groups", "vocab_size")
    _check_size(config, "num_hot_tokens", "vocab_size")
    _check_size(config, "head_rank", "hidden_size")
    if config.num_groups is not None:
        _check_size(config, "num_active_groups", "num_groups")
        _check_size(config, "max_active_groups", "num_groups")
        _check_grouping(config)
    if config.active_mass is not None and not 0 < config.active_mass <= 1:
        raise ValueError(
            f"`active_mass` is {config.active_mass}; use a share above 0, at most 1, or None."
        )


def _check_grouping(config: PreTrainedConfig) -> None:
    if (config.grouping == "contiguous") != (config.grouping_hash is None):
        raise ValueError(
            f"`grouping` is {config.grouping!r} and `grouping_hash` {config.grouping_hash}: all"
            " groupings but 'contiguous' come with an order of the vocabulary. Leave both out"
            " and call drafter.heads.add_router(num_groups, num_active_groups, order), or train"
            " with CoralTrainingArguments(stage='router', grouping=...)."
        )
    if config.max_active_groups is not None and config.routing != "union":
        raise ValueError(
            f"`max_active_groups` is {config.max_active_groups}, which is for routing='union',"
            f" but `routing` is {config.routing!r}; leave it out."
        )


def _check_size(config: PreTrainedConfig, name: str, limit: str) -> None:
    """Raise a ValueError unless a field is None or from 1 to another field's value."""
    value, most = getattr(config, name), getattr(config, limit)
    if value is not None and not 1 <= value <= most:
        raise ValueError(f"`{name}` is {value}; use a value from 1 to `{limit}` = {most}.")
