"""Judgement of a target: whether it verifies trees, chains, or takes no drafter.

In: any model of transformers, as it is. Out: a `Judgement` by the tables; what is in none of them
is refused.
"""

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
from .entries import REFUSED, TABLES, Findings, Judgement, finding, judge
from .foreign import foreign_findings, foreign_hooks, has_foreign_attention, state_of
from .quantization import quantization_findings

logger = logging.get_logger(__name__)

LINEAR = "LinearAttentionLayer"

# of each target, the state that was judged last
_judged: WeakKeyDictionary[PreTrainedModel, tuple[tuple | None, Judgement]] = WeakKeyDictionary()


def judge_target(model: PreTrainedModel, rows: int = 0) -> Judgement:
    """Judge whether and how a drafter can draft for a target.

    Args:
        model: any model of transformers, or one in a `PeftModel`.
        rows: of the call that is to be drafted for, if any; what hangs on a target may count them.
    """
    adapters = judge(_adapters(model))
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
    return judge([finding("Placement", "sharded", count)] if is_sharded else [])


def _adapters(model: PreTrainedModel) -> Findings:
    """What the adapters of PEFT in a target allow."""
    title = "Adapters of PEFT"
    # where PEFT learns a prompt, it replaces this method of the target for the time of a call
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    around = getattr(getattr(prepare, "__self__", model), "active_peft_config", None)
    if around is not None and around.is_prompt_learning:
        yield finding(title, "prompt learning", around.peft_type.value)
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "alora_invocation_tokens", None):
            yield finding(title, "aLoRA")
        elif not adapter.is_prompt_learning:
            yield finding(title, getattr(adapter.peft_type, "value", adapter.peft_type))


def _structure(model: PreTrainedModel) -> Findings:
    text, classes = text_config(model), "Classes of transformers"
    refused = [base.__name__ for base in type(model).__mro__ if base.__name__ in TABLES[classes]]
    if refused:
        yield finding(classes, refused[0])
    found = {
        "encoder-decoder": model.config.is_encoder_decoder,
        "no layers": getattr(text, "num_hidden_layers", None) is None,
        "no text token by token": not isinstance(model, GenerationMixin),
        "no LM head": model.get_output_embeddings() is None,
        "expert capacity": getattr(text, "expert_capacity", None),
        "recurrent state": model._is_stateful,
        "no position_ids": not takes_positions(model),
        "alibi": getattr(text, "alibi", False),
        "local attention": "local" in getattr(text, "attention_layers", ()),  # GPT-Neo
    }
    for name in (name for name, is_so in found.items() if is_so):
        yield finding("Structure", name)


def _features(model: PreTrainedModel) -> Findings:
    title, text = "Features, for drafters that read them", text_config(model)
    streams = getattr(text, "altup_num_inputs", 1)
    if streams != 1:
        yield finding(title, "streams", streams)
    width = getattr(read_target(model).embeddings, "embedding_dim", text.hidden_size)
    if width != text.hidden_size:  # OPT-350m
        yield finding(title, "embedding width", f"{width} and its layers {text.hidden_size}")


def _cache_layers(model: PreTrainedModel) -> Findings:
    names = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    if LINEAR in names and not model._is_stateful:  # as transformers itself tells them apart
        names = names - {LINEAR} | {f"{LINEAR} of convolutions alone"}
    for name in sorted(names):
        yield finding("Cache layers", name)


def _attention(model: PreTrainedModel) -> Findings:
    if not has_foreign_attention(model):
        yield finding("Attention functions", model.config._attn_implementation)


def _layer_types(model: PreTrainedModel) -> Findings:
    for name in sorted(set(getattr(text_config(model), "layer_types", None) or ())):
        yield finding("Layer types", name)


def _rotary(model: PreTrainedModel) -> Findings:
    for name in sorted(rotary_types(model)):
        yield finding("Rotary embeddings", name)
