"""The door to `generate`: the one place that knows `GenerationMixin`.

In: `target.generate(..., assistant_model=drafter)`. Out: the same call with our loop as its decoding method. transformers
has no registry for assistants, so its public `generate` is wrapped once; calls without a CORAL drafter pass untouched.
"""

import functools
import inspect
from collections.abc import Callable

from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..configuration_coral import CoralConfig
from ..modeling_coral import TREE_DEFAULTS, CoralDrafter
from ..target import (
    Target,
    cache_obstacle,
    check_tokenizer,
    read_target,
    text_config,
    tree_obstacle,
)
from .candidate_generator import CoralCandidateGenerator, Drafting
from .loop import CoralGenerateOutput, DecodingLoop
from .scoring import TargetScorer
from .sequence import Sequence
from .tree import TreeShape

logger = logging.get_logger(__name__)

# keywords of `generate` that are ours
TREE_KEYWORDS = tuple(TREE_DEFAULTS)
OWN_KEYWORDS = (*TREE_KEYWORDS, "draft_head")


def install() -> None:
    """Wrap `GenerationMixin.generate` so that it takes a CORAL drafter as `assistant_model`; once is enough."""
    plain = GenerationMixin.generate
    if is_installed():
        return

    @functools.wraps(plain)
    def generate(self, *args, **kwargs):
        drafter = _assistant(plain, self, args, kwargs)
        if not is_coral(drafter):
            return plain(self, *args, **kwargs)
        return _generate_with(plain, drafter, self, args, kwargs)

    generate.is_coral_door = True
    GenerationMixin.generate = generate


def uninstall() -> None:
    """Give `GenerationMixin.generate` back as it was before `import coral_hf`."""
    if is_installed():
        GenerationMixin.generate = GenerationMixin.generate.__wrapped__


def is_installed() -> bool:
    """Whether `generate` takes a CORAL drafter as `assistant_model`."""
    return getattr(GenerationMixin.generate, "is_coral_door", False)


def is_coral(assistant: object) -> bool:
    """Whether an assistant is a CORAL drafter, loaded with or without this package's own classes."""
    config = getattr(assistant, "config", None)
    return getattr(config, "model_type", None) == CoralConfig.model_type


def _assistant(plain: Callable, model: PreTrainedModel, args: tuple, kwargs: dict) -> object:
    """The `assistant_model` of a call, given by keyword or by position."""
    if not args:
        return kwargs.get("assistant_model")
    return (
        inspect.signature(plain)
        .bind_partial(model, *args, **kwargs)
        .arguments.get("assistant_model")
    )


def _generate_with(
    plain: Callable, drafter: CoralDrafter, model: PreTrainedModel, args: tuple, kwargs: dict
):
    """Call plain `generate` with our loop as its decoding method."""
    call = inspect.signature(plain).bind(model, *args, **kwargs).arguments
    call.pop("assistant_model")
    call.pop("self")
    call |= call.pop("kwargs", {})
    if call.get("custom_generate") is not None:
        raise ValueError(
            "`custom_generate` and a CORAL `assistant_model` are two decoding loops; pass one of them."
        )
    own = {name: call.pop(name) for name in OWN_KEYWORDS if name in call}
    # `generate` keeps a streamer and a tokenizer to itself when a callable decodes, so they are bound here
    loop = decoder(drafter, streamer=call.get("streamer"), tokenizer=call.get("tokenizer"), **own)
    call["stopping_criteria"] = _with_stop_strings(call)
    return plain(model, **call, custom_generate=loop)


def _with_stop_strings(call: dict) -> StoppingCriteriaList | None:
    """The call's criteria, with the one for `stop_strings`, which `generate` cannot build without the tokenizer."""
    criteria = call.get("stopping_criteria")
    strings = call.pop("stop_strings", None)
    config = call.get("generation_config")
    if strings is None and config is not None and config.stop_strings is not None:
        strings = config.stop_strings
        call["generation_config"] = GenerationConfig(**{**config.to_dict(), "stop_strings": None})
    if strings is None:
        return criteria
    if call.get("tokenizer") is None:
        raise ValueError(
            "`stop_strings` was passed without `tokenizer`; pass the target's tokenizer to `generate` too."
        )
    return StoppingCriteriaList([*(criteria or []), StopStringCriteria(call["tokenizer"], strings)])


def decoder(
    drafter: CoralDrafter,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings,
) -> Callable:
    """The decoding loop as a callable for `generate(..., custom_generate=coral_hf.decoder(drafter))`.

    Args:
        drafter: a CORAL drafter of the target.
        streamer: gets every token in order.
        tokenizer: of the target, compared with the one the drafter was trained with.
        settings: `tree_depth`, `tree_top_k`, `tree_nodes`, `draft_head`; the drafter's `generation_config` by default.
    """
    unknown = sorted(set(settings) - set(OWN_KEYWORDS))
    if unknown:
        raise ValueError(f"Unknown settings {unknown}; use {list(OWN_KEYWORDS)}.")
    if tokenizer is not None:
        check_tokenizer(tokenizer, drafter.config)
    head = settings.pop("draft_head", None)

    def drafting(target: Target) -> Drafting:
        return CoralCandidateGenerator(drafter, target, head)

    shape = {
        name: getattr(drafter.generation_config, name, TREE_DEFAULTS[name])
        for name in TREE_KEYWORDS
    }
    return decoder_of(drafter.config, drafting, shape, settings, streamer)


def decoder_of(
    config: CoralConfig,
    drafting: Callable[[Target], Drafting],
    shape: dict[str, int],
    settings: dict[str, int],
    streamer: BaseStreamer | None,
) -> Callable:
    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> Tensor | CoralGenerateOutput:
        check_call(model, input_ids, generation_config, model_kwargs)
        target = read_target(model, config)
        tree_shape, takes_tree = choose_shape(model, shape, settings)
        loop = DecodingLoop(
            drafting(target),
            TargetScorer(target, takes_tree),
            Sequence(input_ids, logits_processor, stopping_criteria, streamer),
            generation_config,
            tree_shape,
            _max_length(model, stopping_criteria),
        )
        loop.run(model_kwargs)
        return loop.output()

    return decode


def choose_shape(
    model: PreTrainedModel, shape: dict[str, int], settings: dict[str, int]
) -> tuple[TreeShape, bool]:
    """The largest tree of a call, and whether the target verifies trees.

    Args:
        shape: the drafter's own settings.
        settings: those of the call, which win; asking for a tree where only a chain is safe raises.
    """
    wanted = {**shape, **{name: value for name, value in settings.items() if value is not None}}
    for name, value in wanted.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}; use a value of at least 1.")
    obstacle = tree_obstacle(model)
    if obstacle is None:
        return TreeShape(*(wanted[name] for name in TREE_KEYWORDS)), True
    if settings.get("tree_top_k", 1) > 1:
        raise ValueError(
            f"`tree_top_k` is {settings['tree_top_k']}, but this target cannot verify a tree: {obstacle}."
            " Leave it out, or pass tree_top_k=1 for a chain."
        )
    logger.info(f"The target drafts in chains: {obstacle}.")
    return TreeShape(wanted["tree_depth"], 1, wanted["tree_depth"] + 1), False


def check_call(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict
) -> None:
    """Refuse, with a ValueError, what a drafter cannot do; nothing is silently done another way."""
    if config.prompt_lookup_num_tokens is not None:
        raise ValueError(
            "`prompt_lookup_num_tokens` and a CORAL drafter both draft; pass one of them."
        )
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"A CORAL drafter works with greedy search and sampling; the call asks for {mode.value}."
            " Set num_beams=1 and leave out penalty_alpha, dola_layers and constraints, or drop `assistant_model`."
        )
    if not config.use_cache:
        raise ValueError(
            "`use_cache` is False, but a drafter needs the target's cache; pass use_cache=True."
        )
    if config.output_attentions or config.output_hidden_states:
        raise ValueError(
            "`output_attentions` and `output_hidden_states` are not returned with a drafter; call the target once on"
            " the finished sequence to get them."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"The target {type(model).__name__} is an encoder-decoder; a CORAL drafter needs a decoder."
        )
    _check_input(model, input_ids, config)
    _check_cache(model, config, model_kwargs.get("past_key_values"))


def _check_input(model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig) -> None:
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
            f"The prompt has {length} tokens, but the target has {limit} positions; shorten the prompt."
        )


def _check_cache(model: PreTrainedModel, config: GenerationConfig, cache: Cache | None) -> None:
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"`cache_implementation` is {config.cache_implementation!r}; a drafter works with the default cache."
        )
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"`past_key_values` already holds {cache.get_seq_length()} tokens; with a drafter, pass the whole text as"
            " `input_ids` and no cache."
        )
    obstacle = cache_obstacle(model)
    if obstacle is not None:
        raise ValueError(f"The target {type(model).__name__} cannot take a drafter: {obstacle}.")


def _position_limit(model: PreTrainedModel) -> int | None:
    """Positions of a target with a table of them; rotary ones go on, as in plain `generate`."""
    text = text_config(model)
    has_table = getattr(text, "rope_parameters", None) is None and tree_obstacle(model) is None
    return text.max_position_embeddings if has_table else None


def _max_length(model: PreTrainedModel, criteria: StoppingCriteriaList) -> int:
    """Tokens that the text may have: a tree never reaches beyond them.

    With a table of P positions, the text ends at P + 1 tokens: the last one is never read.
    """
    limit = _position_limit(model)
    lengths = [criteria.max_length, None if limit is None else limit + 1]
    return min(length for length in lengths if length is not None)
