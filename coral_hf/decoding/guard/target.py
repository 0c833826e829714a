"""Judgement of a target: whether it verifies trees, chains, or takes no drafter.

In: any model of transformers, as it is. Out: a `Judgement` by the tables; what is in none of them
is refused.
"""

from collections.abc import Iterator
from typing import Any

from torch import distributed, nn
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
from ..preparation.needs import preparation_findings, rotary_types
from .entries import REFUSED, TABLES, Findings, Judgement, finding, judge
from .foreign import foreign_findings, foreign_hooks, has_foreign_attention

logger = logging.get_logger(__name__)

LINEAR = "LinearAttentionLayer"


def judge_target(model: PreTrainedModel, rows: int = 0) -> Judgement:
    """Judge whether and how a drafter can draft for a target.

    Args:
        model: any model of transformers, or one in a `PeftModel`.
        rows: of the call that is to be drafted for, if any; what hangs on a target may count them.
    """
    found = judge(_adapters(model))
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    for findings in (_structure(model), _layers(model)):
        found &= judge(findings)
        if found.way == REFUSED:  # the rest may not be there to look at
            return found
    found &= judge(foreign_findings(model, rows))
    # a convolution reads the padding of rows that have ended, as in plain `generate`
    keeps_rows = bool(foreign_hooks(model)) or CONVOLUTION in sliding_windows(model)
    return found._replace(keeps_rows=keeps_rows)


def accept_target(model: PreTrainedModel, rows: int = 0) -> Judgement:
    """Judge a target, and raise a ValueError if it cannot take a drafter; notes are said once."""
    judgement = judge_target(model, rows).accepted(_refusal(model))
    for note in judgement.notes:
        logger.warning_once(f"The target {type(model).__name__} is drafted for, but {note}.")
    return judgement


def accept_features(model: PreTrainedModel) -> None:
    """Raise a ValueError if a target has no features that a drafter could read."""
    judge(_features(model)).accepted(_refusal(model))


def _refusal(model: PreTrainedModel) -> str:
    """How the refusal of a target begins."""
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
    return f"The target {kind.__name__} cannot take a drafter: "


def placement_findings(model: PreTrainedModel) -> Findings:
    """Whether this process alone can run a target's passes, as rounds need.

    Processes that each hold a shard of it would run different numbers of passes, and wait for each
    other's weights.
    """
    count = distributed.get_world_size() if distributed.is_initialized() else 1
    # FSDP2 may wrap only a target's layers; ZeRO-3 marks the weights that it shards
    if count > 1 and (
        is_fsdp_managed_module(model)
        or any(isinstance(module, FSDPModule) for module in all_modules(model))
        or any(hasattr(weight, "ds_id") for weight in model.parameters())
    ):
        yield finding("Placement", "sharded", count)


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


def _layers(model: PreTrainedModel) -> Findings:
    names = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    if LINEAR in names and not model._is_stateful:  # as transformers itself tells them apart
        names = names - {LINEAR} | {f"{LINEAR} of convolutions alone"}
    attention = [] if has_foreign_attention(model) else [model.config._attn_implementation]
    types = {*(getattr(text_config(model), "layer_types", None) or ())}
    yield from (finding("Cache layers", name) for name in sorted(names))
    yield from (finding("Attention functions", name) for name in attention)
    yield from (finding("Layer types", name) for name in sorted(types))
    yield from (finding("Rotary embeddings", name) for name in sorted(rotary_types(model)))
    kinds = {*_quantization_of_config(model), *_quantization_of_torchao(model)}
    yield from (finding("Quantization", kind) for kind in sorted(kinds))
    yield from preparation_findings(model)


def _quantization_of_config(model: PreTrainedModel) -> Iterator[str]:
    """The kind of a target's `quantization_config`, if it has one.

    A pass over a tree has other tokens in it than a plain pass: where a layer's scale, or its
    choice of columns, is taken over all of them, the output is no longer the same to the last
    digit, though it is the target's own text but for near ties. Such kinds are drafted, and that is
    said once.
    """
    given = getattr(model.config, "quantization_config", None)
    if given is None or getattr(given, "dequantize", False):
        return
    config: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    method = str(getattr(config.get("quant_method"), "value", config.get("quant_method")))
    if method == "bitsandbytes":
        is_8bit = config.get("load_in_8bit") or config.get("_load_in_8bit")
        method += "_8bit" if is_8bit else "_4bit"
        if is_8bit and config.get("llm_int8_threshold") == 0.0:
            method += " without outliers"
    elif method == "compressed-tensors" and _scales_tensors(config):
        method += " of dynamic tensors"
    elif method == "fp8" and config.get("activation_scheme") == "static":
        method += " static"
    elif method == "fp_quant" and config.get("forward_dtype") == "mxfp4":
        method += " mxfp4"
    elif method == "quanto" and config.get("activations"):
        method += " of activations"
    if method != "torchao":  # whose weights tell more
        yield method


def _scales_tensors(config: dict[str, Any]) -> bool:
    """Whether compressed tensors scale activations over a whole pass."""
    groups = (config.get("config_groups") or {}).values()
    inputs = [group.get("input_activations") or {} for group in groups if isinstance(group, dict)]
    dynamic = [one for one in inputs if one.get("dynamic") not in (None, False)]
    return any(one.get("strategy") in (None, "tensor", "tensor_group") for one in dynamic)


def _quantization_of_torchao(model: nn.Module) -> set[str]:
    """The kinds of torchao's weights in a model, whoever has put them there."""
    found = set()
    weights = (weight for module in all_modules(model) for weight in module._parameters.values())
    for weight in weights:
        is_plain = type(weight) is nn.Parameter  # most are, and asking costs little
        if is_plain or not type(weight).__module__.startswith("torchao."):
            continue
        activations = getattr(weight, "act_quant_kwargs", None)
        if activations is None or getattr(weight, "act_quant_scale", None) is not None:
            found.add("torchao")
            continue
        scale = type(getattr(activations, "granularity", None)).__name__
        found.add("torchao by row" if scale in ("PerRow", "PerToken") else "torchao by tensor")
    return found
