"""Configuration of a Recurrent Drafter (Cheng et al. 2024).

In: the config of a target. Out: `RecurrentConfig`: whether the state goes through an RNN, and the
head's blocks and width.
"""

from huggingface_hub.dataclasses import strict

from ..configuration import FamilyConfig


@strict
class RecurrentConfig(FamilyConfig):
    """Configuration of a [`RecurrentDrafter`]; its own fields have the published names.

    `RecurrentConfig.from_target` fills in everything that follows from a target. What it shares
    with other families is in `FamilyConfig`.

    Args:
        exit_dim: width of the head; twice `hidden_size` by default, which needs no projection.
        num_draft_layers: residual blocks of the head.
        rnn: whether a state goes through an RNN; else it is a sum of embeddings.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from coral_hf import RecurrentConfig
    >>> RecurrentConfig.from_target(LlamaConfig(hidden_size=256)).exit_dim
    512
    ```
    """

    model_type = "coral_recurrent"
    # the name by which commands and model cards ask for the layers of any drafter
    attribute_map = {"num_hidden_layers": "num_draft_layers"}

    exit_dim: int | None = None
    num_draft_layers: int = 2
    rnn: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.exit_dim is None:
            self.exit_dim = 2 * self.hidden_size
        for name, least in (("exit_dim", 1), ("num_draft_layers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; use {least} or more.")
