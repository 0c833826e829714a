"""Configuration of a CORAL drafter.

In: the config of a target. Out: `CoralConfig`: the drafter's own sizes, its draft heads, and the
identity of its target.
"""

from huggingface_hub.dataclasses import strict

from ...heads.settings import check_head_fields
from ..configuration import DrafterConfig


@strict
class CoralConfig(DrafterConfig):
    """Configuration of a [`CoralDrafter`].

    The defaults describe EAGLE-1's drafter for a Llama-2-7B target. `CoralConfig.from_target`
    fills in everything that follows from a target. What it shares with other families is in
    `DrafterConfig`.

    Args:
        fc_bias: a bias in the projection of [embedding; feature].
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

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from coral_hf import CoralConfig
    >>> CoralConfig.from_target(LlamaConfig(hidden_size=256, vocab_size=1000)).hidden_size
    256
    ```
    """

    model_type = "coral"

    fc_bias: bool = False

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

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_head_fields(self)
