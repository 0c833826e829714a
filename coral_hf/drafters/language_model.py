"""A small causal language model as a drafter: trees, batches and rounds of constant shapes.

In: a model with the target's tokenizer. Out: a drafter that reads tokens alone, with the model's
own KV cache and LM head. transformers' own assisted decoding takes such a model for chains of one
sequence.

    committed tokens     x0   x1   x2   x3       x3 is the root, which the target has not read
    begin reads          x0   x1   x2   x3       the hidden state after x3 gives level 1
    a level reads        its nodes               and gives the next level
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationConfig

from ..decoding.caches.continuation import CACHE
from ..decoding.caches.shared_keys import sharing_keys
from ..decoding.drafting import register_drafting
from ..decoding.guard import judge_target
from ..decoding.target_runner import masks_by_layer
from ..heads.draft_heads import OtherVocabulary
from ..identity import record_tokenizer
from ..lm_head import execution_device
from ..target import (
    Target,
    decoder_of,
    position_limit,
    read_target,
    sliding_windows,
    takes_positions,
    text_config,
)
from .cached_drafting import CachedDrafting, DrafterMemory

UNIVERSAL = (
    "A model with another tokenizer drafts by transformers' universal assisted decoding:"
    " `target.generate(..., assistant_model=model, tokenizer=..., assistant_tokenizer=...)`."
)


class LanguageModelConfig(PreTrainedConfig):
    """What a call of `generate` asks of a [`LanguageModelDrafter`]; it is never saved.

    Args:
        vocab_size: rows of the model's LM head.
        target_name_or_path: not known.
        tokenizer_hash, tokenizer_size: of the model's tokenizer, where it was given.
    """

    model_type = "coral_language_model"

    vocab_size: int = 0
    target_name_or_path: str | None = None
    tokenizer_hash: str | None = None
    tokenizer_size: int | None = None


class LanguageModelDrafter(nn.Module):
    """A small language model that drafts for a larger one with the same tokenizer.

    It is the model itself that is saved and published; the settings of trees lie in its
    `generation_config`, as `coral_hf.autotune` writes them.

    Args:
        model: any decoder of transformers that takes trees.
        tokenizer: the model's, compared with the `tokenizer` of each call that has one. Without it
            the vocabularies of model and target must be equally large, paddings included.

    Raises:
        ValueError: for a model that cannot read trees.

    Example:

    ```python
    >>> small = AutoModelForCausalLM.from_pretrained("org/small", dtype=target.dtype)
    >>> target.generate(**inputs, assistant_model=coral_hf.LanguageModelDrafter(small))
    ```
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        read_target(model)  # which says so where there is no LM head
        if obstacle := judge_target(model).obstacle:
            raise ValueError(
                f"{type(model).__name__} cannot draft trees: {obstacle}. Pass the model itself as"
                " `assistant_model`: transformers' own assisted decoding takes it."
            )
        super().__init__()
        self.model = model.eval()
        self.config = config_of(model, tokenizer)

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's own."""
        return self.model.generation_config

    def num_parameters(self) -> int:
        """Count the model's parameters."""
        return self.model.num_parameters()


def config_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> LanguageModelConfig:
    """Note which tokens a small model has: how many, and its tokenizer's where that is given."""
    config = LanguageModelConfig(vocab_size=text_config(model).vocab_size)
    config._name_or_path = model.name_or_path
    if tokenizer is not None:
        record_tokenizer(tokenizer, config)
    return config


class LanguageModelDrafting(CachedDrafting):
    """Drafts for one call of `generate` with a [`LanguageModelDrafter`]; see [`CachedDrafting`]."""

    layers: tuple[int, ...] = ()
    lead = 1

    def __init__(
        self, drafter: LanguageModelDrafter, target: Target, memory: DrafterMemory | None = None
    ):
        model, num_tokens = drafter.model, text_config(target.model).vocab_size
        check_vocabulary(drafter.config, num_tokens)
        super().__init__(model, target, sliding_windows(model), memory)
        own = read_target(model)
        self.head = OtherVocabulary(own.head.logits, num_tokens)
        self._decoder, self._embeddings = decoder_of(model), own.embeddings
        self._takes_positions, self._limit = takes_positions(model), position_limit(model)

    @property
    def device(self):
        """See [`FixedDrafting`]."""
        return execution_device(self._embeddings)

    def _begin(self, tokens: Tensor, features: Tensor, positions: Tensor, is_new: bool) -> None:
        """Read all tokens, (batch, length + 1); of continued ones the first was read before."""
        own = torch.cat([positions, positions[:, -1:] + 1], dim=1)  # of the root too
        first = 0 if is_new else 1
        self._read(tokens[:, first:], features, own[:, first:])

    def _mask(self, positions: Tensor, own: Tensor) -> Any:
        return masks_by_layer(self.drafter, self._cache, positions, own)

    def _step(self, tokens: Tensor, states: Tensor, positions: Tensor, mask: Any) -> Tensor:
        """See [`CachedDrafting`]; `states` are not read."""
        inputs = {CACHE: self._cache, "use_cache": True, "attention_mask": mask}
        if self._takes_positions:
            positions, limit = positions.expand_as(tokens), self._limit
            # tokens beyond the limit are never emitted
            inputs["position_ids"] = positions if limit is None else positions.clamp(max=limit - 1)
        if torch.compiler.is_compiling():  # a graph has no place for another function
            return self._decoder(input_ids=tokens, **inputs).last_hidden_state
        with sharing_keys():
            return self._decoder(input_ids=tokens, **inputs).last_hidden_state


def check_vocabulary(
    config: LanguageModelConfig,
    num_tokens: int,
    remedy: str = "LanguageModelDrafter(model, tokenizer=tokenizer)",
) -> None:
    """Raise a ValueError if only a tokenizer can tell whether two models have the same tokens.

    `remedy`: how the small model's is passed.
    """
    if config.vocab_size != num_tokens and config.tokenizer_hash is None:
        raise ValueError(
            f"The small model has {config.vocab_size} tokens and the target {num_tokens}. If they"
            f" differ by padding and the tokenizers are the same, use `{remedy}`. {UNIVERSAL}"
        )


register_drafting(LanguageModelConfig.model_type, LanguageModelDrafting)
