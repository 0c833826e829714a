"""Configurations of EAGLE-3 drafters (Li et al. 2025), their 3.1 variants, and parallel drafters.

In: the config of a target. Out: `Eagle3Config`: which of the target's layers the drafter reads, its
draft vocabulary, and where its norms are; `ParallelConfig` (P-EAGLE), with more layers.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...heads.settings import check_sizes
from ..configuration import DrafterConfig

DRAFT_VOCABULARY = 32000  # tokens, as published
PARALLEL_LAYERS = 4  # as published


@strict
class Eagle3Config(DrafterConfig):
    """Configuration of an [`Eagle3Drafter`].

    `Eagle3Config.from_target` fills in everything that follows from a target. What it shares with
    other families is in `DrafterConfig`, and how its LM head is read in `HeadFields`.

    Args:
        target_layers: the hidden states of the target that are fused, as indices into its
            `hidden_states`: `i` is what the layers before layer `i` made, so the input of that
            layer.
        target_num_layers: of the target.
        target_hidden_size: width of the target; `hidden_size` by default.
        draft_vocab_size: tokens that the drafter can propose; all by default.
        norm_before_residual: the first layer adds to the normed hidden state, not to the one that
            it got.
        norm_before_fc: one norm over all fused hidden states (EAGLE-3 for gpt-oss).
        fc_norm: a norm over each of the fused hidden states (EAGLE-3.1).
        norm_output: a step reads the last one's output after the final norm (EAGLE-3.1).
        fc_bias, output_bias, mlp_bias: biases in the fusion, the attention's output projection and
            the feed-forward blocks.
        qk_norm: norms of queries and keys, as in Qwen3.
        has_embeddings: whether the drafter has embeddings of its own; else it reads the target's.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from coral_hf import Eagle3Config
    >>> Eagle3Config.from_target(LlamaConfig(num_hidden_layers=32)).target_layers
    [2, 16, 29]
    ```
    """

    model_type = "coral_eagle3"

    target_layers: list[int] | tuple[int, ...] = (2, 16, 29)
    target_num_layers: int | None = None
    target_hidden_size: int | None = None
    draft_vocab_size: int | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    fc_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    has_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.target_layers = list(self.target_layers)
        self.target_hidden_size = self.target_hidden_size or self.hidden_size
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        check_sizes(self, 1, self.vocab_size, "draft_vocab_size")
        depth, layers = self.target_num_layers, self.target_layers
        if not layers or (depth is not None and not all(0 <= layer <= depth for layer in layers)):
            raise ValueError(
                f"`target_layers` are {layers}, and the target has {depth} layers: use hidden"
                f" states from 0 to {depth}, such as {default_layers(depth or 32)}."
            )
        if not self.has_embeddings and self.target_hidden_size != self.hidden_size:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}, and the target's embeddings have"
                f" {self.target_hidden_size} channels; set `has_embeddings`."
            )

    @classmethod
    def _own_fields(cls, text: PreTrainedConfig) -> dict[str, Any]:
        return super()._own_fields(text) | {
            "target_layers": default_layers(text.num_hidden_layers),
            "target_num_layers": text.num_hidden_layers,
            "target_hidden_size": text.hidden_size,
            "draft_vocab_size": min(DRAFT_VOCABULARY, text.vocab_size),
            "attention_bias": False,
        }


def default_layers(num_layers: int) -> list[int]:
    """A low, a middle and a high hidden state of a target, as indices into its `hidden_states`.

    As published, the inputs of layers 2, L // 2 and L - 3; in a target too shallow for three
    different ones, as far apart as there are.
    """
    if num_layers >= 7:
        return [2, num_layers // 2, num_layers - 3]
    if num_layers >= 4:
        return [1, num_layers // 2, num_layers - 1]
    return list(range(num_layers + 1))[-3:]


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
        check_sizes(self, 0, self.vocab_size - 1, "mask_token_id")

    @classmethod
    def _own_fields(cls, text: PreTrainedConfig) -> dict[str, Any]:
        return super()._own_fields(text) | {"num_hidden_layers": PARALLEL_LAYERS}
