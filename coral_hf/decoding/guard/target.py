"""Judgement of a target: whether it verifies trees, chains, or takes no drafter.

In: any model of transformers, as it is. Out: a `Judgement` by the tables; what is in none of them
is refused.
"""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import distributed
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import logging

from ...target import (
    CONVOLUTION,
    all_modules,
    read_target,
    sliding_windows,
    takes_positions,
    text_config,
)
from ..preparation.needs import preparation_findings
from ..preparation.switches import rotary_types
from ..preparation.tables import ROTARY, UNKNOWN_ROTARY
from . import target_tables as tables
from .adapters import adapter_findings
from .classes import refused_name
from .entries import REFUSED, Entry, Judgement, judge
from .foreign import foreign_findings, foreign_hooks, has_foreign_attention, state_of
from .quantization import quantization_findings

logger = logging.get_logger(__name__)

LINEAR = "LinearAttentionLayer"

Findings = Iterator[tuple[object, Entry]]

# of each target, the state that was judged last
_judged: WeakKeyDictionary[PreTrainedModel, tuple[tuple | None, Judgement]] = WeakKeyDictionary()


def judge_target(model: PreTrainedModel, rows: int = 0) -> Judgement:
    """Judge whether and how a drafter can draft for a target.

    Args:
        model: any model of transformers, or one in a `PeftModel`.
        rows: of the call that is to be drafted for, if any; what hangs on a target may count them.
    """
    adapters = judge(adapter_findings(model))
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = state_of(model)
    known = _judged.get(model)
    if state is None or known is None or known[0] != state:
        known = state, _judge_itself(model, rows)
        if state is not None:
            _judged[model] = known
    return adapters & known[1]


def _judge_itself(model: PreTrainedModel, rows: int) -> Judgement:
    found = judge(_structure(model))
    if found.way == REFUSED:  # the rest may not be there to look at
        return found
    layers = [*_cache_layers(model), *_attention(model), *_layer_types(model), *_rotary(model)]
    found &= judge([*layers, *quantization_findings(model), *preparation_findings(model)])
    if found.way == REFUSED:
        return found
    found &= judge(foreign_findings(model, rows))
    return found._replace(
        # a convolution reads the padding of rows that have ended, as in plain `generate`
        keeps_rows=bool(foreign_hooks(model)) or CONVOLUTION in sliding_windows(model),
    )


def accept_target(model: PreTrainedModel, rows: int = 0) -> Judgement:
    """Judge a target, and raise a ValueError if it cannot take a drafter; notes are said once."""
    judgement = judge_target(model, rows)
    _raise_if_refused(model, judgement)
    for note in judgement.notes:
        logger.warning_once(f"The target {type(model).__name__} is drafted for, but {note}.")
    return judgement


def accept_features(model: PreTrainedModel) -> None:
    """Raise a ValueError if a target has no features that a drafter could read."""
    _raise_if_refused(model, judge(_features(model)))


def _raise_if_refused(model: PreTrainedModel, judgement: Judgement) -> None:
    if judgement.way == REFUSED:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        raise ValueError(
            f"The target {type(model).__name__} cannot take a drafter: {judgement.reasons[0]}."
        )


def judge_placement(model: PreTrainedModel) -> Judgement:
    """Judge whether this process alone can run a target's passes, as rounds need.

    Processes that each hold a shard of it would run different numbers of passes, and wait for each
    other's weights.
    """
    count = distributed.get_world_size() if distributed.is_initialized() else 1
    if count == 1:
        return Judgement()
    # FSDP2 may wrap only a target's layers; ZeRO-3 marks the weights that it shards
    is_sharded = (
        is_fsdp_managed_module(model)
        or any(isinstance(module, FSDPModule) for module in all_modules(model))
        or any(hasattr(weight, "ds_id") for weight in model.parameters())
    )
    return judge([(count, tables.PLACEMENT["sharded"])] if is_sharded else [])


def _structure(model: PreTrainedModel) -> Findings:
    entries, text = tables.STRUCTURE, text_config(model)
    if model.config.is_encoder_decoder:
        yield "", entries["encoder-decoder"]
    if getattr(text, "num_hidden_layers", None) is None:
        yield "", entries["no layers"]
    if not isinstance(model, GenerationMixin):
        yield "", entries["no text token by token"]
    if name := refused_name(type(model)):
        yield name, tables.REFUSED_CLASSES[name]
    if model.get_output_embeddings() is None:
        yield "", entries["no LM head"]
    if getattr(text, "expert_capacity", None):
        yield "", entries["expert capacity"]
    if model._is_stateful:
        yield "", entries["recurrent state"]
    if not takes_positions(model):
        yield "", entries["no position_ids"]
    if getattr(text, "alibi", False):
        yield "", entries["alibi"]
    if "local" in getattr(text, "attention_layers", ()):  # GPT-Neo
        yield "", entries["local attention"]


def _features(model: PreTrainedModel) -> Findings:
    entries, text = tables.FEATURES, text_config(model)
    streams = getattr(text, "altup_num_inputs", 1)
    if streams != 1:
        yield streams, entries["streams"]
    width = getattr(read_target(model).embeddings, "embedding_dim", text.hidden_size)
    if width != text.hidden_size:  # OPT-350m
        yield f"{width} and its layers {text.hidden_size}", entries["embedding width"]


def _cache_layers(model: PreTrainedModel) -> Findings:
    names = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    if LINEAR in names and not model._is_stateful:  # as transformers itself tells them apart
        names = names - {LINEAR} | {f"{LINEAR} of convolutions alone"}
    for name in sorted(names):
        yield name, tables.CACHE_LAYERS.get(name, tables.UNKNOWN_CACHE_LAYER)


def _attention(model: PreTrainedModel) -> Findings:
    if not has_foreign_attention(model):
        name = model.config._attn_implementation
        yield name, tables.ATTENTION[name]


def _layer_types(model: PreTrainedModel) -> Findings:
    for name in sorted(set(getattr(text_config(model), "layer_types", None) or ())):
        yield name, tables.LAYER_TYPES.get(name, tables.UNKNOWN_LAYER_TYPE)


def _rotary(model: PreTrainedModel) -> Findings:
    for name in sorted(rotary_types(model)):
        yield name, ROTARY.get(name, UNKNOWN_ROTARY)
