"""Judgement of a call of `generate`: whether a drafter can follow it.

In: a target, and everything that `generate` has prepared. Out: a `Judgement` by the tables.
"""

from collections.abc import Iterator

from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode

from ...target import position_limit, text_config
from ..settings import Rule
from . import call_tables as tables
from .entries import REFUSED, Entry, Judgement, judge
from .target import judge_placement

DECODING_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# "static" asks for fixed shapes, which is about speed: the tokens are the same with ours
KNOWN_CACHES = (None, "dynamic", "dynamic_full", "static")

Findings = Iterator[tuple[object, Entry]]


def judge_call(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    rule: Rule,
) -> Judgement:
    """Judge whether and how a drafter can follow a call.

    Args:
        input_ids: (batch, length).
        model_kwargs: what `generate` has prepared for the target.
        rule: by which trees are drafted and verified.
    """
    inputs = _inputs(model, input_ids, model_kwargs)
    lengths = _lengths(model, criteria)
    return judge([*_modes(config), *inputs, *lengths]) & judge_placement(model)


def accept_call(*args) -> Judgement:
    """Judge a call, see [`judge_call`], and raise a ValueError if it cannot be drafted for."""
    judgement = judge_call(*args)
    if judgement.way == REFUSED:
        raise ValueError(f"{judgement.reasons[0]}.")
    return judgement


def _modes(config: GenerationConfig) -> Findings:
    """What of a call's mode does not go with a drafter."""
    mode = config.get_generation_mode()
    if config.prompt_lookup_num_tokens is not None:
        yield "", tables.MODES["prompt_lookup_num_tokens"]
    if mode not in DECODING_MODES:
        yield mode.value, tables.MODES["mode"]
    if not config.use_cache:
        yield "", tables.MODES["use_cache"]
    if config.cache_implementation not in KNOWN_CACHES:
        yield config.cache_implementation, tables.MODES["cache_implementation"]


def _inputs(model: PreTrainedModel, input_ids: Tensor, model_kwargs: dict) -> Findings:
    """What of a call's prompts, (batch, length), a drafter cannot continue."""
    length, limit = input_ids.shape[1], position_limit(model)
    mask = model_kwargs.get("attention_mask")
    if model_kwargs.get("inputs_embeds") is not None:
        yield "", tables.INPUTS["inputs_embeds"]
    elif length == 0:
        yield "", tables.INPUTS["empty prompt"]
    elif mask is not None and not mask[:, -1].all():
        yield "", tables.INPUTS["padding on the right"]
    elif limit is not None and length > limit:
        sizes = f"{length} tokens, but the target has {limit}"
        yield sizes, tables.INPUTS["prompt beyond the positions"]


def _lengths(model: PreTrainedModel, criteria: StoppingCriteriaList) -> Findings:
    """What of the longest text that a call may write a drafter cannot follow."""
    keys, longest = getattr(text_config(model), "keep_window_size", None), criteria.max_length
    if keys is not None and longest is not None and longest > keys:  # Doge
        yield f"{longest} tokens, but `keep_window_size` is {keys}", tables.INPUTS["best keys"]
