"""The door to `generate`: the one place that knows `GenerationMixin`.

In: `target.generate(..., assistant_model=drafter)`. Out: the same call with our loop as its
decoding method. transformers has no registry for assistants, so its public `generate` is wrapped
once; calls without a CORAL drafter pass untouched.
"""

import functools
import inspect
from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from ..identity import check_tokenizer
from ..target import read_target, sliding_windows
from .continuation import (
    CACHE,
    MEMORY,
    continued_cache,
    is_user_cache,
    returned_cache,
    whole_length,
)
from .draft_policy import choose_policy
from .drafting import family_of, family_options
from .loop import CoralGenerateOutput, DecodingLoop, Plan
from .sequences import Sequences
from .settings import (
    DECODING_KEYWORDS,
    TREE_DEFAULTS,
    Settings,
    check_call,
    check_rule,
    choose_rule,
    choose_shape,
    max_length_of,
)
from .target_runner import OutputCollector, TargetRunner


def install() -> None:
    """Let `GenerationMixin.generate` take a CORAL drafter as `assistant_model`; once is enough."""
    plain = GenerationMixin.generate
    if is_installed():
        return

    @functools.wraps(plain)
    def generate(self, *args, **kwargs):
        drafter = _assistant(plain, self, args, kwargs)
        if family_of(drafter) is None:
            return plain(self, *args, **kwargs)
        return _generate_with(plain, drafter, self, args, kwargs)

    vars(generate)["is_coral_door"] = True
    GenerationMixin.generate = generate


def uninstall() -> None:
    """Give `GenerationMixin.generate` back as it was before `import coral_hf`."""
    if is_installed():
        GenerationMixin.generate = GenerationMixin.generate.__wrapped__


def is_installed() -> bool:
    """Whether `generate` takes a CORAL drafter as `assistant_model`."""
    return getattr(GenerationMixin.generate, "is_coral_door", False)


def _without_wrapper(drafter: PreTrainedModel) -> PreTrainedModel:
    """The drafter inside of a `PeftModel`, whose adapter acts within its layers."""
    adapters = getattr(drafter, "peft_config", {}).values()
    if any(adapter.is_prompt_learning for adapter in adapters):
        raise ValueError(
            "The drafter's adapter learns virtual tokens, but a drafter reads features and no"
            " tokens of its own; use an adapter of its layers, such as LoRA."
        )
    return drafter.get_base_model() if hasattr(drafter, "get_base_model") else drafter


def _assistant(plain: Callable, model: PreTrainedModel, args: tuple, kwargs: dict) -> Any:
    """The `assistant_model` of a call, given by keyword or by position."""
    if not args:
        return kwargs.get("assistant_model")
    call = inspect.signature(plain).bind_partial(model, *args, **kwargs)
    return call.arguments.get("assistant_model")


def _generate_with(
    plain: Callable, drafter: PreTrainedModel, model: PreTrainedModel, args: tuple, kwargs: dict
):
    """Call plain `generate` with our loop as its decoding method."""
    call = inspect.signature(plain).bind(model, *args, **kwargs).arguments
    call.pop("assistant_model")
    call.pop("self")
    call |= call.pop("kwargs", {})
    if call.get("custom_generate") is not None:
        raise ValueError(
            "`custom_generate` and a CORAL `assistant_model` are two decoding loops; pass one of"
            " them."
        )
    if call.pop("synced_gpus", None):
        raise ValueError(
            "`synced_gpus` is True, but a drafter's rounds differ between ranks; generate on one"
            " rank, or without `assistant_model`."
        )
    ours = (*DECODING_KEYWORDS, *family_options())
    own = {name: call.pop(name) for name in ours if name in call}
    # `generate` hands a callable neither streamer nor tokenizer, so they are bound here
    loop = decoder(drafter, streamer=call.get("streamer"), tokenizer=call.get("tokenizer"), **own)
    call["stopping_criteria"] = _with_stop_strings(call, model.generation_config)
    return plain(model, **call, custom_generate=loop)


def _with_stop_strings(call: dict, own: GenerationConfig) -> StoppingCriteriaList | None:
    """The call's criteria, with the one for `stop_strings`, of the call or of its target's `own`.

    `generate` cannot build it: it passes no tokenizer on when a callable decodes.
    """
    criteria = call.get("stopping_criteria")
    strings = call.pop("stop_strings", None)
    config = call.get("generation_config")
    if config is not None and config.stop_strings is not None:
        strings = config.stop_strings if strings is None else strings
        call["generation_config"] = copy(config)
        call["generation_config"].stop_strings = None
    if own.stop_strings is not None:
        strings = own.stop_strings if strings is None else strings
        call["stop_strings"] = None  # nothing else keeps `generate` from taking the target's own
    if strings is None:
        return criteria
    if call.get("tokenizer") is None:
        raise ValueError(
            "`stop_strings` was passed without `tokenizer`; pass the target's tokenizer to"
            " `generate` too."
        )
    return StoppingCriteriaList([*(criteria or []), StopStringCriteria(call["tokenizer"], strings)])


class Call(NamedTuple):
    """One call of `generate`: its drafter, its settings, and what `generate` has prepared."""

    drafter: PreTrainedModel
    settings: Settings  # of the call, by keyword
    options: dict[str, Any]  # of the drafter's family, by keyword
    streamer: BaseStreamer | None
    model: PreTrainedModel  # the target
    input_ids: Tensor  # (batch, length)
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]


def build_loop(call: Call) -> DecodingLoop:
    """Everything that a call needs for its rounds, checked against each other."""
    model, config, settings = call.model, call.config, call.settings
    check_call(model, call.input_ids, config, call.model_kwargs)
    own = getattr(call.drafter, "generation_config", None)
    defaults: Settings = {
        name: getattr(own, name, TREE_DEFAULTS.get(name)) for name in DECODING_KEYWORDS
    }
    rule = choose_rule(config.do_sample, defaults, settings)
    shape, takes_tree = choose_shape(model, defaults, settings, rule)
    sequences = Sequences(
        call.input_ids,
        call.processors,
        call.criteria,
        call.streamer,
        pad_token(config),
        is_lockstep=not takes_tree,
    )
    check_rule(rule, sequences)
    given, windows = call.model_kwargs.get(CACHE), sliding_windows(model)
    # who gets a cache may go on with it
    keep_cache = config.return_dict_in_generate or is_user_cache(given)
    batch, length = call.input_ids.shape
    cache = continued_cache(given, windows, length, whole_length(call.input_ids, call.model_kwargs))
    target, family = read_target(model), family_of(call.drafter)
    assert family is not None, "decoder() has looked it up"
    memory = getattr(given, MEMORY, None)
    drafting = family.start(call.drafter, target, memory=memory, **call.options)
    collector = OutputCollector(config, batch, windows)
    runner = TargetRunner(
        target, takes_tree, drafting.layers, cache, collector.extras, keeps_rows=keep_cache
    )
    speculation = settings.get("speculation") or defaults.get("speculation")
    costs = getattr(own, "draft_costs", None)
    policy = choose_policy(model, shape, speculation, costs, config.do_sample)
    longest = max_length_of(model, call.criteria)
    plan = Plan(rule, longest, keep_cache, config.prefill_chunk_size)
    return DecodingLoop(drafting, runner, sequences, collector, policy, plan)


def decoder(
    drafter: PreTrainedModel,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings,
) -> Callable:
    """The decoding loop as a callable, for `generate(..., custom_generate=decoder(drafter))`.

    Args:
        drafter: a drafter of the target, of a family that is registered, or one in a `PeftModel`.
        streamer: gets every token in order.
        tokenizer: of the target, compared with the one the drafter was trained with.
        settings: `tree_depth`, `tree_top_k`, `tree_nodes`, `speculation`, and when sampling
            `verification` ("token", "traversal" or "block") and `drawn_tree`; the drafter's
            `generation_config` by default. Also the options of the drafter's family, such as
            CORAL's `draft_head`.
    """
    drafter = _without_wrapper(drafter)
    family = family_of(drafter)
    if family is None:
        raise ValueError(
            f"`drafter` is a {type(drafter).__name__}, which is no drafter of a registered family;"
            " pass a drafter, or call `coral_hf.register_drafting` for its `model_type` first."
        )
    unknown = sorted(set(settings) - {*DECODING_KEYWORDS, *family.options})
    if unknown:
        raise ValueError(
            f"Unknown settings {unknown}; use {[*DECODING_KEYWORDS, *family.options]}."
        )
    if tokenizer is not None:
        check_tokenizer(tokenizer, drafter.config)
    options = {name: settings.pop(name) for name in family.options if name in settings}

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> Tensor | CoralGenerateOutput:
        prepared = input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        loop = build_loop(Call(drafter, settings, options, streamer, model, *prepared))
        loop.run(model_kwargs)
        cache = returned_cache(model_kwargs.get(CACHE), loop.target.whole_cache())
        setattr(cache, MEMORY, loop.memory())
        return loop.output(cache)

    return decode


def pad_token(config: GenerationConfig) -> int:
    """The token that fills rows which have ended."""
    prepared = config._pad_token_tensor
    return 0 if prepared is None else int(prepared)
