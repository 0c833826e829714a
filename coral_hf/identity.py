"""Names, revisions and digests of targets, weights, tokenizers, datasets and files.

In: a model, a tokenizer, a dataset, a file or plain values. Out: strings and numbers to keep beside
a result, which tell later whether it still belongs to them.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import CONFIG_NAME

TOKEN_COLUMNS = ("input_ids", "labels", "position_ids")  # of a dataset, what is trained on
BLOCK = 4096  # bytes of a weight that are summed to one number
CHUNK = 1 << 24  # bytes of a file that are read at a time
SAMPLES = 1024  # numbers of a weight that are read one by one: a sum would miss that two swap


def digest(value: Any) -> str:
    """Hash a plain value as JSON (SHA-256, keys sorted); what JSON cannot write counts by `str`."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """Compute the SHA-256 of the bytes of a file."""
    found = sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def rows_digest(rows: Any) -> str:
    """Compute the SHA-256 of the token columns of a `datasets.Dataset`, whatever type stores them.

    They are read as Arrow arrays: lists of Python numbers would take minutes.
    """
    import pyarrow.compute as arrow

    names = [name for name in TOKEN_COLUMNS if name in rows.column_names]
    found = sha256(repr(names).encode())
    for batch in rows.with_format("arrow").select_columns(names).iter(batch_size=1000):
        for name in names:
            for part in (arrow.list_value_length(batch[name]), arrow.list_flatten(batch[name])):
                found.update(part.fill_null(-1).to_numpy().astype("int64").tobytes())
    return found.hexdigest()


def seed_of(*parts: int) -> int:
    """Derive the seed of what some numbers name, such as (seed, row, turn)."""
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:6], "big")


def full_name(name: str) -> str | None:
    """Return a target's Hub id, or the absolute path of its folder; None without a name."""
    return os.path.abspath(name) if os.path.isdir(name) else name or None


def cached_commit(name: str) -> str | None:
    """Look up the commit of a Hub model in the local cache; None for a folder.

    Newer versions of transformers keep no commit in a config. Where the cache holds several
    commits, nothing tells which of them was loaded: None.
    """
    if not name or os.path.isdir(name):
        return None
    with suppress(HFValidationError):  # the path of a folder that is gone
        path = try_to_load_from_cache(name, CONFIG_NAME)
        if isinstance(path, str) and len(os.listdir(Path(path).parents[1])) == 1:
            return Path(path).parent.name
    return None


def tokenizer_hash(tokenizer: Tokenizer, num_tokens: int | None = None) -> str:
    """Compute the SHA-256 of a tokenizer's map from tokens to ids, on which a drafter depends.

    `num_tokens`: of the tokens with the lowest ids alone, as added tokens get the highest ones.
    """
    tokens = sorted(tokenizer.get_vocab().items())
    if num_tokens is not None:
        tokens = sorted(sorted(tokens, key=itemgetter(1))[:num_tokens])
    return sha256(json.dumps(tokens, ensure_ascii=False).encode()).hexdigest()


_hash_of_size = lru_cache(maxsize=8)(tokenizer_hash)


def short_hash(tokenizer: Tokenizer) -> str:
    """Return the first digits of `tokenizer_hash`, computed once for each size of a tokenizer."""
    return _hash_of_size(tokenizer, len(tokenizer))[:16]


def check_tokenizer(tokenizer: Tokenizer, config: PreTrainedConfig) -> None:
    """Raise a ValueError if a drafter was trained with another tokenizer.

    One that has gained tokens since is the same: it maps the earlier ones to the same ids.
    """
    expected, size = (getattr(config, f"tokenizer_{name}", None) for name in ("hash", "size"))
    if expected is not None and expected != tokenizer_hash(tokenizer, size):
        whose = f"the drafter's ({config.target_name_or_path or 'unnamed target'})"
        what = f"The tokenizer that was passed maps tokens to other ids than {whose}"
        raise ValueError(f"{what}. Pass the target's own tokenizer.")


def record_tokenizer(tokenizer: Tokenizer, config: PreTrainedConfig) -> None:
    """Keep in a drafter's config which tokenizer it is for, unless it is known already.

    Raises:
        ValueError: if it is for another one.
    """
    check_tokenizer(tokenizer, config)
    if config.tokenizer_hash in (None, own := tokenizer_hash(tokenizer)):
        config.tokenizer_hash, config.tokenizer_size = own, len(tokenizer.get_vocab())


class TargetIdentity(NamedTuple):
    """What the features and logits of a target depend on, beside its config."""

    digest: str  # of `weights_digest`
    dtype: str  # such as 'bfloat16'
    quantization: str | None  # how the weights of a quantised target are packed


def identify(target: PreTrainedModel) -> TargetIdentity:
    """Compute the identity of a target; under FSDP all processes call it."""
    dtype = str(target.dtype).removeprefix("torch.")
    return TargetIdentity(weights_digest(target), dtype, quantization_of(target))


def quantization_of(target: PreTrainedModel) -> str | None:
    """Describe the quantisation of a target: its config, or the classes of its packed weights."""
    config = target.config.to_dict().get("quantization_config")
    if config is not None:
        return json.dumps(config, sort_keys=True, default=str)
    kinds = {type(weight) for weight in target.parameters()} - {nn.Parameter, Tensor, DTensor}
    return ", ".join(sorted(kind.__name__ for kind in kinds)) or None


@torch.no_grad()
def weights_digest(model: PreTrainedModel) -> str:
    """Compute the SHA-256 of sums over all weights and of samples; any training changes it.

    Weights are read as bf16 rounds them, so a checkpoint has one digest in float32 and bfloat16,
    on every device. Quantised weights are read as they are packed, offloaded ones module by module,
    those sharded by FSDP2 in all processes together. PEFT adapters count by their weights and by
    which of them are active, so a merged adapter makes another model. A weight without data (meta)
    counts by name and shape alone.
    """
    found = sha256(_active_adapters(model).encode())
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = model.state_dict().keys()  # computed tables differ by rounding between devices
    for prefix, module in model.named_modules():
        with align_module_device(module):
            own = module.named_parameters(prefix, recurse=False)
            for name, weight in chain(own, module.named_buffers(prefix, recurse=False)):
                if name in kept:
                    found.update(f"{name} {tuple(weight.shape)}".encode())
                    for part in _plain_parts(weight):
                        found.update(_summary(part))
    return found.hexdigest()


def _active_adapters(model: PreTrainedModel) -> str:
    is_wrapper = hasattr(model, "get_base_model")  # a `PeftModel`
    if not is_wrapper and not getattr(model, "_hf_peft_config_loaded", False):
        return ""
    from peft import get_model_status

    status = get_model_status(model)
    return f"{status.enabled} {status.active_adapters} {status.merged_adapters}"


def _plain_parts(weight: Tensor) -> Iterator[Tensor]:
    """Yield the tensors of a weight, of any shape: packed numbers and scales if it is quantised."""
    if isinstance(weight, DTensor):
        yield weight.full_tensor()
    elif is_traceable_wrapper_subclass(weight):
        for name in weight.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(weight, name))
    elif not weight.is_meta:
        yield weight


def _summary(weight: Tensor) -> bytes:
    """Sum a weight of any shape over blocks, in integers that no order changes, and sample it."""
    is_wide = weight.is_floating_point() and weight.element_size() > 1
    values = weight.bfloat16() if is_wide else weight
    bits = values.contiguous().flatten().view(torch.uint8)
    if bits.storage_offset() % 8:  # a view that is not aligned to eight bytes
        bits = bits.clone()
    whole = len(bits) - len(bits) % BLOCK
    words = bits[:whole].view(torch.int64)
    sums = words.view(-1, BLOCK // 8).sum(-1)  # (blocks,)
    sample = words[:: max(len(words) // SAMPLES, 1)]
    parts = (sums, sample, bits[whole:])
    return b"".join(part.cpu().numpy().tobytes() for part in parts)
