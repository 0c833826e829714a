"""Quantized layers: whether a token's output depends on the other tokens of its pass.

In: a target. Out: an `Entry` for each kind of quantization that it has. A pass over a tree has
other tokens in it than a plain pass: where a layer's scale, or its choice of columns, is taken over
all of them, the output is no longer the same to the last digit, though it is the target's own text
but for near ties. Such kinds are drafted, and that is said once.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...target import all_modules
from .entries import Findings, finding


def quantization_findings(model: PreTrainedModel) -> Findings:
    """The entries of all kinds of quantization that a target has."""
    for kind in sorted({*_of_config(model), *_of_torchao(model)}):
        yield finding("Quantization", kind)


def _of_config(model: PreTrainedModel) -> Iterator[str]:
    """The kind of a target's `quantization_config`, if it has one."""
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
    elif method == "compressed-tensors":
        method += " of dynamic tensors" if _scales_tensors(config) else ""
    elif method == "fp8":
        method += " static" if config.get("activation_scheme") == "static" else ""
    elif method == "fp_quant":
        method += " mxfp4" if config.get("forward_dtype") == "mxfp4" else ""
    elif method == "quanto":
        method += " of activations" if config.get("activations") else ""
    if method != "torchao":  # whose weights tell more
        yield method


def _scales_tensors(config: dict[str, Any]) -> bool:
    """Whether compressed tensors scale activations over a whole pass."""
    groups = (config.get("config_groups") or {}).values()
    inputs = [group.get("input_activations") or {} for group in groups if isinstance(group, dict)]
    dynamic = [one for one in inputs if one.get("dynamic") not in (None, False)]
    return any(one.get("strategy") in (None, "tensor", "tensor_group") for one in dynamic)


def _of_torchao(model: nn.Module) -> set[str]:
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
