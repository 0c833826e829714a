"""What a call asks for against what its target can do.

In: a target and what `generate` has prepared. Out: the tree to draft, or a ValueError that says
what cannot be done; nothing is silently done another way.
"""

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.utils import logging

from ..target import adapter_obstacle, cache_obstacle, position_limit, sharding_obstacle

logger = logging.get_logger(__name__)

DECODING_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# "static" asks for fixed shapes, which is about speed: the tokens are the same with ours
KNOWN_CACHES = (None, "dynamic", "dynamic_full", "static")


def check_call(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict
) -> None:
    """Refuse what a drafter cannot do.

    Args:
        input_ids: (batch, length).
        model_kwargs: what `generate` has prepared for the target.

    Raises:
        ValueError: with the setting, its value and what to do.
    """
    _check_mode(model, config)
    _check_target(model)
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "`inputs_embeds` was passed, but a drafter reads the tokens of a text; pass"
            " `input_ids` alone, or drop `assistant_model`."
        )
    _check_input(model, input_ids, model_kwargs.get("attention_mask"))
    _check_cache(config)


def _check_mode(model: PreTrainedModel, config: GenerationConfig) -> None:
    if config.prompt_lookup_num_tokens is not None:
        raise ValueError(
            "`prompt_lookup_num_tokens` and a CORAL drafter both draft; pass one of them."
        )
    mode = config.get_generation_mode()
    if mode not in DECODING_MODES:
        raise ValueError(
            "A CORAL drafter works with greedy search and sampling; the call asks for"
            f" {mode.value}. Set num_beams=1 and leave out penalty_alpha, dola_layers and"
            " constraints, or drop `assistant_model`."
        )
    if not config.use_cache:
        raise ValueError(
            "`use_cache` is False, but a drafter needs the target's cache; pass use_cache=True."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"The target {type(model).__name__} is an encoder-decoder; a CORAL drafter needs a"
            " decoder."
        )


def _check_input(model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None) -> None:
    length = input_ids.shape[1]
    if length == 0:
        raise ValueError("The prompt is empty; pass at least one token, such as the BOS token.")
    if mask is not None and not mask[:, -1].all():
        raise ValueError(
            "`attention_mask` ends with 0 in some row, but text goes on at the right end of a row;"
            " pad on the left: tokenizer.padding_side = 'left'."
        )
    limit = position_limit(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"The prompt has {length} tokens, but the target has {limit} positions; shorten the"
            " prompt."
        )


def _check_target(model: PreTrainedModel) -> None:
    obstacle = cache_obstacle(model) or adapter_obstacle(model) or sharding_obstacle(model)
    if obstacle is not None:
        raise ValueError(f"The target {type(model).__name__} cannot take a drafter: {obstacle}.")


def _check_cache(config: GenerationConfig) -> None:
    if config.cache_implementation not in KNOWN_CACHES:
        raise ValueError(
            f"`cache_implementation` is {config.cache_implementation!r}; a drafter works with the"
            " default cache."
        )


def longest_text(model: PreTrainedModel, criteria: StoppingCriteriaList) -> int:
    """Tokens that the text may have: a tree never reaches beyond them.

    With a table of P positions, the text ends at P + 1 tokens: the last one is never read.
    """
    limit = position_limit(model)
    lengths = [criteria.max_length, None if limit is None else limit + 1]
    return min(length for length in lengths if length is not None)
