"""Configuration of a parallel drafter: that of an EAGLE-3 drafter, with more layers.

In: the config of a target. Out: `ParallelConfig`.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..eagle3 import Eagle3Config

LAYERS = 4  # as published


@strict
class ParallelConfig(Eagle3Config):
    """Configuration of a [`ParallelDrafter`].

    `ParallelConfig.from_target` fills in everything that follows from a target. Its other fields
    are those of `Eagle3Config`.

    Args:
        mask_token_id: the token whose row of an embedding table is the mask embedding in the files
            of vLLM and of other trainers: one that no text has. Only they need it.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from coral_hf import ParallelConfig
    >>> ParallelConfig.from_target(LlamaConfig(num_hidden_layers=32)).num_hidden_layers
    4
    ```
    """

    model_type = "coral_parallel"

    mask_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` is {self.mask_token_id}; use a token from 0 to"
                f" {self.vocab_size - 1} that no text has, or None."
            )

    @classmethod
    def _own_fields(cls, text: PreTrainedConfig) -> dict[str, Any]:
        return super()._own_fields(text) | {"num_hidden_layers": LAYERS}
