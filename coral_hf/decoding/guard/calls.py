"""Judgement of a call of `generate`: whether a drafter can follow it.

In: a target, and everything that `generate` has prepared. Out: a `Judgement` by the tables.
"""

from inspect import signature
from typing import Any, NamedTuple

from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode

from ...target import position_limit, text_config
from ..caches.continuation import CACHE
from ..preparation.needs import further_inputs
from ..settings import Rule
from ..watchers import STATEFUL
from .entries import TABLES, TREE, Findings, Judgement, finding, judge
from .foreign import LIBRARIES, has_adapters_by_row, root_of
from .target import accept_target, placement_findings

# A field of a refused entry is refused where its value is neither the default nor the one that
# the target's own config has; a keyword where it is passed. Names in neither table are refused.
KEYWORDS, FIELDS = TABLES["Keywords of a call"], TABLES["Generation settings"]
UNKNOWN, MODES, PROMPTS = "Other settings", "Modes of a call", "Prompts of a call"

DECODING_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# "static" asks for fixed shapes, which is about speed: the tokens are the same with ours
KNOWN_CACHES = (None, "dynamic", "dynamic_full", "static")


class Call(NamedTuple):
    """A call of `generate`, as it comes to its decoding loop."""

    model: PreTrainedModel
    input_ids: Tensor  # (batch, length)
    config: GenerationConfig
    model_kwargs: dict[str, Any]  # what `generate` has prepared for the target
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    keywords: tuple[str, ...] = ()  # that the caller has set, where they are known


def accept_call(call: Call, rule: Rule) -> Judgement:
    """Judge whether and how a drafter can follow a call, its target included.

    Args:
        rule: by which trees are drafted and verified.

    Raises:
        ValueError: if none can.
    """
    target, rows = accept_target(call.model, len(call.input_ids)), len(call.input_ids)
    settings = [*_settings(call.model, call.config), *_keywords(call)]
    inputs = [*_prompts(call), *further_inputs(call.model_kwargs)]
    watched = [*_caches(call.model_kwargs.get(CACHE)), *_rule(call, rule)]
    found = judge([*settings, *inputs, *watched, *placement_findings(call.model)]).accepted()
    return target & found._replace(keeps_rows=rows > 1 and has_adapters_by_row(call.model))


def accept_keywords(model: PreTrainedModel, call: dict[str, Any]) -> None:
    """Raise a ValueError if the keywords of a call, by name, ask for what no drafter does.

    Plain `generate` leaves some of them out where a callable decodes, goes to another method
    altogether, or raises an error of its own before it hands the call on.
    """
    given = {n: value for n, value in call.items() if value is not None and value is not False}
    names = [*given, *(["paged"] if given.get("cache_implementation") == "paged" else [])]
    found = [(name, KEYWORDS[name]) for name in names if name in KEYWORDS]
    config = GenerationConfig()
    # the last one wins
    for settings in (model.generation_config, given.get("generation_config"), given):
        named = vars(settings) if isinstance(settings, GenerationConfig) else settings or {}
        vars(config).update({name: named[name] for name in FIELDS if named.get(name) is not None})
    judge([*found, *_settings(model, config)]).accepted()


def refuse_continuous_batching() -> None:
    """Raise the ValueError of a call of `generate_batch` with a drafter."""
    judge([finding(MODES, "generate_batch")]).accepted()


def _settings(model: PreTrainedModel, config: GenerationConfig) -> Findings:
    """What of a call's mode does not go with a drafter, and what it sets that has no effect."""
    mode = config.get_generation_mode()
    if config.prompt_lookup_num_tokens is not None:
        yield finding(MODES, "prompt_lookup_num_tokens")
    if mode not in DECODING_MODES:
        yield finding(MODES, "mode", mode.value)
    if config.use_cache is False:
        yield finding(MODES, "use_cache")
    if config.cache_implementation not in KNOWN_CACHES:
        yield finding(MODES, "cache_implementation", config.cache_implementation)
    plain = GenerationConfig()
    defaults = plain._get_default_generation_params()
    own = model.generation_config
    for name in vars(plain):
        entry = FIELDS.get(name, TABLES[UNKNOWN]["any other field"])
        value = getattr(config, name, None)
        # the target's own settings are for any drafter, and plain calls have them too
        untouched = (None, False, defaults.get(name), getattr(own, name, None))
        if entry.way < TREE and not any(value is one or value == one for one in untouched):
            yield name, entry


def _keywords(call: Call) -> Findings:
    """Keywords that have gone nowhere."""
    takers = call.model.prepare_inputs_for_generation, call.model.forward
    taken = {name for taker in takers for name in signature(taker).parameters}
    known = {*KEYWORDS, *FIELDS, *vars(call.config), *call.model_kwargs, *taken}
    for name in call.keywords:
        if name not in known:
            yield finding(UNKNOWN, "any other keyword", name)


def _caches(cache: Cache | None) -> Findings:
    """What of a cache that was passed is lost in ours."""
    if cache is None:
        return
    name = type(cache).__name__
    layers = getattr(cache, "layers", ())
    kinds = {base.__name__ for layer in layers for base in type(layer).__mro__}
    if kinds & {"QuantizedLayer", "BaseQuantizedLayer"}:
        yield finding("Caches of a call", "quantized", name)
    if getattr(cache, "offloading", False):
        yield finding("Caches of a call", "offloaded", name)
    if any(root_of(type(one)) not in LIBRARIES for one in (cache, *layers)):
        yield finding("Caches of a call", "foreign", name)


def _rule(call: Call, rule: Rule) -> Findings:
    """Processors for which no tree is drawn."""
    for one in call.processors:
        if rule.is_drawn and isinstance(one, STATEFUL):
            yield finding(MODES, "drawn tree", type(one).__name__)


def _prompts(call: Call) -> Findings:
    """What of a call's prompts, or of the longest text that it may write, cannot be drafted for."""
    length, limit = call.input_ids.shape[1], position_limit(call.model)
    mask = call.model_kwargs.get("attention_mask")
    keys = getattr(text_config(call.model), "keep_window_size", None)  # Doge
    if call.model_kwargs.get("inputs_embeds") is not None:
        yield finding(PROMPTS, "inputs_embeds")
    elif length == 0:
        yield finding(PROMPTS, "empty prompt")
    elif mask is not None and not mask[:, -1].all():
        yield finding(PROMPTS, "padding on the right")
    elif limit is not None and length > limit:
        sizes = f"{length} tokens, but the target has {limit}"
        yield finding(PROMPTS, "prompt beyond the positions", sizes)
    if keys is not None and (longest := call.criteria.max_length or 0) > keys:
        sizes = f"{longest} tokens, but `keep_window_size` is {keys}"
        yield finding(PROMPTS, "best keys", sizes)
