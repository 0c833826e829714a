"""Configuration of a CORAL drafter.

In: the config of a target. Out: `CoralConfig`: the drafter's own sizes, its draft heads, and the
identity of its target.
"""

from huggingface_hub.dataclasses import strict

from ...heads.settings import HeadFields, check_head_fields
from ..configuration import DrafterConfig


@strict
class CoralConfig(HeadFields, DrafterConfig):
    """Configuration of a [`CoralDrafter`].

    The defaults describe EAGLE-1's drafter for a Llama-2-7B target. `CoralConfig.from_target`
    fills in everything that follows from a target. What it shares with other families is in
    `DrafterConfig`, its draft heads are in `HeadFields`.

    Args:
        fc_bias: a bias in the projection of [embedding; feature].

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

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_head_fields(self)
