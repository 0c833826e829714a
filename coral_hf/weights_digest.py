"""Whose words, features or measurements a file holds: a digest of a model's weights.

In: a target or drafter, wherever its weights lie. Out: a hash, or a `TargetIdentity`, to be kept
beside what it made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from itertools import chain
from typing import NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

BLOCK = 4096  # bytes of a weight that are summed to one number
SAMPLES = 1024  # numbers of a weight that are read as they are, which a sum would not tell apart


class TargetIdentity(NamedTuple):
    """What tells the numbers of one target from those of another."""

    digest: str  # of `weights_digest`
    dtype: str  # such as 'bfloat16'
    quantization: str | None  # how the weights of a quantised target are packed


def identify(target: PreTrainedModel) -> TargetIdentity:
    """The identity of a target."""
    dtype = str(target.dtype).removeprefix("torch.")
    return TargetIdentity(weights_digest(target), dtype, _quantization(target))


def _quantization(target: PreTrainedModel) -> str | None:
    """The config that a target was quantised with, or the kinds of its weights."""
    config = target.config.to_dict().get("quantization_config")
    if config is not None:
        return json.dumps(config, sort_keys=True, default=str)
    kinds = {type(weight) for weight in target.parameters()} - {nn.Parameter, Tensor, DTensor}
    return ", ".join(sorted(kind.__name__ for kind in kinds)) or None


@torch.no_grad()
def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of sums over all weights and of some of their numbers; any training changes it.

    Weights are read as bf16 rounds them, so a checkpoint has one digest in float32 and bfloat16,
    on every device. Those of quantised targets are read as they are packed, offloaded ones module
    by module from where they lie, those shared out by FSDP2 in all processes together. Adapters of
    PEFT count by their weights and by which of them act, so an adapter that was merged makes
    another model. Of a weight that cannot be read, name and shape count alone.
    """
    digest = sha256(_acting_adapters(model).encode())
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = model.state_dict().keys()  # without tables that are computed, on each device a bit off
    for prefix, module in model.named_modules():
        with align_module_device(module):
            for name, weight in _own_weights(module, prefix):
                if name in kept:
                    digest.update(f"{name} {tuple(weight.shape)}".encode())
                    for part in _plain_parts(weight):
                        digest.update(_summary(part))
    return digest.hexdigest()


def _acting_adapters(model: PreTrainedModel) -> str:
    if isinstance(model, PreTrainedModel) and not model._hf_peft_config_loaded:
        return ""
    from peft import get_model_status

    status = get_model_status(model)
    return f"{status.enabled} {status.active_adapters} {status.merged_adapters}"


def _own_weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module, without those of the modules in it."""
    return chain(
        module.named_parameters(prefix, recurse=False), module.named_buffers(prefix, recurse=False)
    )


def _plain_parts(weight: Tensor) -> Iterator[Tensor]:
    """The tensors that a weight is made of: packed numbers and scales, if it is quantised."""
    if isinstance(weight, DTensor):
        yield weight.full_tensor()
    elif is_traceable_wrapper_subclass(weight):
        for name in weight.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(weight, name))
    elif not weight.is_meta:
        yield weight


def _summary(weight: Tensor) -> bytes:
    """Sums of whole numbers, in which no order of adding shows, and a sample of them."""
    is_wide = weight.is_floating_point() and weight.element_size() > 1
    values = weight.bfloat16() if is_wide else weight
    bits = values.contiguous().flatten().view(torch.uint8)
    if bits.storage_offset() % 8:  # a part of another tensor, not to be read eight bytes at a time
        bits = bits.clone()
    whole = len(bits) - len(bits) % BLOCK
    words = bits[:whole].view(torch.int64)
    sums = words.view(-1, BLOCK // 8).sum(-1)
    sample = words[:: max(len(words) // SAMPLES, 1)]
    parts = (sums, sample, bits[whole:])
    return b"".join(part.cpu().numpy().tobytes() for part in parts)
