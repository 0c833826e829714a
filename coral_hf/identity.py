"""Which target, which weights, which tokenizer, which rows: names, revisions and digests.

In: a model, a tokenizer, a dataset, or plain values. Out: strings and numbers to be kept beside
what was made of them, and compared before it is used again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("input_ids", "labels", "position_ids")
BLOCK = 4096  # bytes of a weight that are summed to one number
SAMPLES = 1024  # numbers of a weight that are read as they are, which a sum would not tell apart


def digest(value: Any) -> str:
    """SHA-256 of a plain value as JSON with sorted keys; where JSON has no form, of its `str`."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def seed_of(*parts: int) -> int:
    """A seed for what some numbers name, such as (seed, row, turn): nothing else has drawn it."""
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:6], "big")


def rows_digest(rows: Dataset) -> str:
    """SHA-256 of the columns of a dataset that are trained on: tokens, labels, positions.

    Read as Arrow: lists would take minutes.
    """
    import pyarrow.compute as arrow

    found = sha256()
    names = [name for name in COLUMNS if name in rows.column_names]
    for batch in rows.with_format("arrow").select_columns(names).iter(batch_size=1000):
        for name in names:
            for part in (arrow.list_value_length(batch[name]), arrow.list_flatten(batch[name])):
                # the same numbers may be stored in other types
                found.update(part.fill_null(-1).to_numpy().astype("int64").tobytes())
    return found.hexdigest()


def full_name(name: str) -> str | None:
    """A target's id; of a folder the whole path, which means the same from elsewhere."""
    return os.path.abspath(name) if os.path.isdir(name) else name or None


def cached_commit(name: str) -> str | None:
    """The commit of a model of the Hub, as the cache knows it; None for a folder.

    Newer versions of transformers keep no commit in a config. Where the cache holds several
    commits, which of them was loaded is not known.
    """
    if not name or os.path.isdir(name):
        return None
    try:
        path = try_to_load_from_cache(name, CONFIG_NAME)
    except HFValidationError:  # of a folder that is no longer there
        return None
    if not isinstance(path, str):
        return None
    commit = os.path.dirname(path)
    return os.path.basename(commit) if len(os.listdir(os.path.dirname(commit))) == 1 else None


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's token → id table, the part that a drafter depends on."""
    table = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return sha256(table.encode()).hexdigest()


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raise a ValueError if a drafter was trained with another tokenizer."""
    if getattr(config, "tokenizer_hash", None) not in (None, tokenizer_hash(tokenizer)):
        raise ValueError(
            "The tokenizer that was passed maps tokens to other ids than the one that the drafter"
            f" was trained with ({config.target_name_or_path or 'unnamed target'}). Pass the"
            " target's own tokenizer."
        )


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
