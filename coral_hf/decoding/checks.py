"""What a call asks for against what its target can do.

In: a target and what `generate` has prepared. Out: the tree to draft, or a ValueError that says
what cannot be done; nothing is silently done another way.
"""

from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.utils import logging

from ..modeling_coral import TREE_DEFAULTS
from ..target import adapter_obstacle, cache_obstacle, text_config, tree_obstacle
from .tree import TreeShape

logger = logging.get_logger(__name__)

DECODING_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
DYNAMIC_CACHES = (None, "dynamic", "dynamic_full")


def choose_shape(
    model: PreTrainedModel, shape: dict[str, int], settings: dict[str, int]
) -> tuple[TreeShape, bool]:
    """The largest tree of a call, and whether the target verifies trees.

    Args:
        shape: the drafter's own settings.
        settings: those of the call, which win; asking for a tree where only a chain is safe raises.
    """
    wanted = shape | {name: value for name, value in settings.items() if value is not None}
    for name, value in wanted.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}; use a value of at least 1.")
    obstacle = tree_obstacle(model)
    if obstacle is None:
        return TreeShape(*(wanted[name] for name in TREE_DEFAULTS)), True
    if settings.get("tree_top_k", 1) > 1:
        raise ValueError(
            f"`tree_top_k` is {settings['tree_top_k']}, but this target cannot verify a tree:"
            f" {obstacle}. Leave it out, or pass tree_top_k=1 for a chain."
        )
    logger.info(f"The target drafts in chains: {obstacle}.")
    return TreeShape(wanted["tree_depth"], 1, wanted["tree_depth"] + 1), False


def check_call(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, cache: Cache | None
) -> None:
    """Refuse what a drafter cannot do.

    Args:
        input_ids: (batch, length).
        cache: the call's `past_key_values`.

    Raises:
        ValueError: with the setting, its value and what to do.
    """
    _check_mode(model, config)
    _check_target(model)
    _check_input(model, input_ids)
    _check_cache(config, cache)


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
    if config.output_attentions or config.output_hidden_states:
        raise ValueError(
            "`output_attentions` and `output_hidden_states` are not returned with a drafter; call"
            " the target once on the finished sequence to get them."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"The target {type(model).__name__} is an encoder-decoder; a CORAL drafter needs a"
            " decoder."
        )


def _check_input(model: PreTrainedModel, input_ids: Tensor) -> None:
    batch, length = input_ids.shape
    if batch > 1:
        raise ValueError(
            f"The batch has {batch} rows; generation with a drafter takes one row at a time."
        )
    if length == 0:
        raise ValueError("The prompt is empty; pass at least one token, such as the BOS token.")
    limit = _position_limit(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"The prompt has {length} tokens, but the target has {limit} positions; shorten the"
            " prompt."
        )


def _check_target(model: PreTrainedModel) -> None:
    obstacle = cache_obstacle(model) or adapter_obstacle(model)
    if obstacle is not None:
        raise ValueError(f"The target {type(model).__name__} cannot take a drafter: {obstacle}.")


def _check_cache(config: GenerationConfig, cache: Cache | None) -> None:
    if config.cache_implementation not in DYNAMIC_CACHES:
        raise ValueError(
            f"`cache_implementation` is {config.cache_implementation!r}; a drafter works with the"
            " default cache."
        )
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"`past_key_values` already holds {cache.get_seq_length()} tokens; with a drafter, pass"
            " the whole text as `input_ids` and no cache."
        )


def _position_limit(model: PreTrainedModel) -> int | None:
    """Positions of a target with a table of them; others go on, as in plain `generate`."""
    text = text_config(model)
    has_table = getattr(text, "rope_parameters", None) is None and tree_obstacle(model) is None
    return text.max_position_embeddings if has_table else None


def longest_text(model: PreTrainedModel, criteria: StoppingCriteriaList) -> int:
    """Tokens that the text may have: a tree never reaches beyond them.

    With a table of P positions, the text ends at P + 1 tokens: the last one is never read.
    """
    limit = _position_limit(model)
    lengths = [criteria.max_length, None if limit is None else limit + 1]
    return min(length for length in lengths if length is not None)
