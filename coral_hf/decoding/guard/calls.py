"""Judgement of a call of `generate`: whether a drafter can follow it.

In: a target, and everything that `generate` has prepared. Out: a `Judgement` by the tables.
"""

from inspect import signature
from itertools import chain
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
from ..watchers import ROW_WISE, STATEFUL, STATELESS
from .entries import REFUSED, TABLES, TREE, Findings, Judgement, finding, judge
from .foreign import LIBRARIES, has_adapters_by_row, root_of
from .target import judge_placement

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


def judge_call(call: Call, rule: Rule) -> Judgement:
    """Judge whether and how a drafter can follow a call.

    Args:
        rule: by which trees are drafted and verified.
    """
    prompts = _inputs(call.model, call.input_ids, call.model_kwargs)
    inputs = chain(prompts, further_inputs(call.model_kwargs))
    settings = chain(_modes(call.config), _fields(call.model, call.config), _keywords(call))
    watched = chain(_caches(call.model_kwargs.get(CACHE)), _rule(call, rule))
    lengths = _lengths(call.model, call.criteria)
    found = judge([*settings, *inputs, *lengths, *watched]) & judge_placement(call.model)
    return found._replace(keeps_rows=len(call.input_ids) > 1 and has_adapters_by_row(call.model))


def accept_call(call: Call, rule: Rule) -> Judgement:
    """Judge a call, see [`judge_call`], and raise a ValueError if it cannot be drafted for."""
    return _accepted(judge_call(call, rule))


def accept_keywords(model: PreTrainedModel, call: dict[str, Any]) -> None:
    """Raise a ValueError if the keywords of a call, by name, ask for what no drafter does.

    Plain `generate` leaves some of them out where a callable decodes, goes to another method
    altogether, or raises an error of its own before it hands the call on.
    """
    given = {n: value for n, value in call.items() if value is not None and value is not False}
    title = "Keywords of a call"
    found = [finding(title, name) for name in given if name in KEYWORDS]
    if given.get("cache_implementation") == "paged":
        found.append(finding(title, "paged"))
    config = GenerationConfig()
    # the last one wins
    for settings in (model.generation_config, given.get("generation_config"), given):
        named = vars(settings) if isinstance(settings, GenerationConfig) else settings or {}
        vars(config).update({name: named[name] for name in FIELDS if named.get(name) is not None})
    _accepted(judge([*found, *_modes(config), *_fields(model, config)]))


def refuse_continuous_batching() -> None:
    """Raise the ValueError of a call of `generate_batch` with a drafter."""
    _accepted(judge([finding(MODES, "generate_batch")]))


def _accepted(judgement: Judgement) -> Judgement:
    if judgement.way == REFUSED:
        raise ValueError(f"{judgement.reasons[0]}.")
    return judgement


def _modes(config: GenerationConfig) -> Findings:
    """What of a call's mode does not go with a drafter."""
    mode = config.get_generation_mode()
    if config.prompt_lookup_num_tokens is not None:
        yield finding(MODES, "prompt_lookup_num_tokens")
    if mode not in DECODING_MODES:
        yield finding(MODES, "mode", mode.value)
    if config.use_cache is False:
        yield finding(MODES, "use_cache")
    if config.cache_implementation not in KNOWN_CACHES:
        yield finding(MODES, "cache_implementation", config.cache_implementation)


def _fields(model: PreTrainedModel, config: GenerationConfig) -> Findings:
    """Settings that have no effect with a drafter, where they were set."""
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
    taken = chain(*(signature(taker).parameters for taker in takers))
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
    """Processors that cannot follow the order in which a rule reads scores."""
    reads_all = rule.name in ("traversal", "block")  # every node, accepted or not
    for one in call.processors:
        is_unknown = type(one) not in STATELESS
        if (reads_all and is_unknown) or (rule.is_drawn and isinstance(one, STATEFUL)):
            yield finding(MODES, "rule that reads all nodes", type(one).__name__)
    is_row_wise = all(type(one) in ROW_WISE for one in call.processors)
    if reads_all and len(call.input_ids) > 1 and not is_row_wise:
        yield finding(MODES, "rule that reads rows alone", rule.name)


def _inputs(model: PreTrainedModel, input_ids: Tensor, model_kwargs: dict) -> Findings:
    """What of a call's prompts, (batch, length), a drafter cannot continue."""
    length, limit = input_ids.shape[1], position_limit(model)
    mask = model_kwargs.get("attention_mask")
    if model_kwargs.get("inputs_embeds") is not None:
        yield finding(PROMPTS, "inputs_embeds")
    elif length == 0:
        yield finding(PROMPTS, "empty prompt")
    elif mask is not None and not mask[:, -1].all():
        yield finding(PROMPTS, "padding on the right")
    elif limit is not None and length > limit:
        sizes = f"{length} tokens, but the target has {limit}"
        yield finding(PROMPTS, "prompt beyond the positions", sizes)


def _lengths(model: PreTrainedModel, criteria: StoppingCriteriaList) -> Findings:
    """What of the longest text that a call may write a drafter cannot follow."""
    keys, longest = getattr(text_config(model), "keep_window_size", None), criteria.max_length
    if keys is not None and longest is not None and longest > keys:  # Doge
        sizes = f"{longest} tokens, but `keep_window_size` is {keys}"
        yield finding(PROMPTS, "best keys", sizes)
