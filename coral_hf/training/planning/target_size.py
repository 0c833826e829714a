"""Weights of a target, counted from its config: also of one that is quantized.

In: a config. Out: the bytes of the weights, and those of the
largest weight that a quantized target unpacks at a time.
"""

import copy
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from ...target import read_target
from .live_bytes import bytes_of

# bits of a weight, its scales included: NF4 has one of fp32 for 64 weights (bitsandbytes), LLM.int8
# one of fp32 for a row
BITS = {4: 4.5, 8: 8.01}


class TargetSize(NamedTuple):
    """Bytes of a target."""

    weights: int
    unpacked: int = 0  # of the largest weight in floating point, while a quantized layer runs


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config without its quantization, with the shapes of the weights before it."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return plain


def target_size(
    model: PreTrainedModel, config: PreTrainedConfig, bits: int | None = None
) -> TargetSize:
    """Count the weights of a target.

    Args:
        model: without data and without quantization, in the dtype of the run.
        config: with its `quantization_config`, if its checkpoint has one.
        bits: 4 or 8, to quantize the layers when it is loaded.
    """
    whole = bytes_of(model)
    given = getattr(config, "quantization_config", None)
    if bits is None and given is None:
        return TargetSize(whole)
    target = read_target(model)
    outer = [*target.head.module.parameters(), *target.embeddings.parameters()]
    kept = {*map(id, outer)}  # in floating point
    layers = [w for w in model.parameters() if w.ndim > 1 and id(w) not in kept]
    count, itemsize = sum(w.numel() for w in layers), model.dtype.itemsize
    unpacked = max((w.numel() for w in layers), default=0) * itemsize
    packed = int(count * BITS[bits or bits_of(given)] / 8)
    return TargetSize(whole - count * itemsize + packed, unpacked)


def bits_of(quantization: Any) -> int:
    """Read how many bits a `quantization_config` keeps of a weight, 4 or 8."""
    given = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method")))
    is_4_bit = given.get("load_in_4bit") or given.get("bits") == 4 or "fp4" in method
    return 4 if is_4_bit else 8
