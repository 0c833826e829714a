"""Tiny random models of every class of transformers, made from the defaults of its config.

In: a config class. Out: a config of the same kind of layers with a few of them and small sizes. A
rule by the name of a field gives its size; `EXCEPTIONS` lists what must be so for one model type.
"""

import re
from copy import deepcopy
from typing import Any

import torch
from conftest import SIZES, VOCAB, WINDOW, scatter_weights
from tiny_fields import EXCEPTIONS, ORIGINAL_LENGTH, REQUIRED
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

LAYERS = 4  # at most; fewer where fewer have every type of layer
# names of fields → their size, the first match counts; fields that are None stay None
RULES: list[tuple[str, Any]] = [
    (r"^(bos|decoder_start)_token_id$", 1),
    (r"^eos_token_id$", None),
    (r"^pad_token_id$", 0),
    (r"vocab_size|vocab_per_layer", VOCAB),
    (r"codebook_size", 8),
    (r"^rotary_dim$", 8),
    (r"adapter_(in|out)_dim|adapter_input_size|codebook_dim", 32),
    (r"(key_value|kv|query_groups|groups)_?heads?$|num_kv_heads|n_kv_head", 2),
    (r"head_dim|kv_channels|d_kv$|head_size", 8),
    (r"heads$|n_head$|num_heads", 4),
    (r"lora_rank", 16),
    (r"(per_tok|per_token|topk|top_k|moe_k)$|moe_topk|top_k_experts|num_selected", 2),
    (r"^(topk_group|n_group)$", 1),
    (r"(num_|n_)(shared)_experts?", 1),
    (r"experts?$|num_local_experts|n_routed_experts", 4),
    (r"sliding_window|window_size|chunk_size|local_attention|attention_window", WINDOW),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq|max_target_positions", 128),
    (r"intermediate|ffn|n_inner|mlp_dim|d_ff", 48),
    (r"hidden_size|d_model|n_embd|embedding_size|embed_dim|word_embed|emb_dim|^dim$|width", 32),
]
LAYER_COUNTS = r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers|num_blocks|n_blocks)$"
OTHER_COUNTS = r"layers$|depth$"


def shrunk(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A small config of a class."""
    return config_class(**_fields(config_class(**REQUIRED.get(config_class.model_type, {}))))


def tiny_model(
    config_class: type[PreTrainedConfig], auto_class: type, seed: int = 0
) -> PreTrainedModel:
    """A random model in float64.

    `auto_class`: whose mapping names the model's class.
    """
    torch.manual_seed(seed)
    model = auto_class.from_config(shrunk(config_class))
    model.set_experts_implementation("eager")  # the grouped kernels know no float64
    scatter_weights(model, seed)
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0)
    return model.double().eval()


def _fields(default: PreTrainedConfig) -> dict[str, Any]:
    """What differs from the defaults in a small config."""
    given = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    kept, changed = _kept_layers(given), {}
    for name, value in given.items():
        if isinstance(value, PreTrainedConfig):
            changed[name] = {**_fields(value), "model_type": value.model_type}
        elif name.endswith("rope_parameters") and value:
            changed[name] = _rope(value)
        elif kept and re.search(LAYER_COUNTS, name) and isinstance(value, int):
            changed[name] = len(kept)
        elif kept and isinstance(value, (list, tuple)) and len(value) == _count(given):
            changed[name] = [value[index] for index in kept]
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            changed[name] = SIZES[name]
        elif name == "tie_word_embeddings":
            # tied, the scaled embedding of a random model's last token outweighs all else
            changed[name] = False
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            changed[name] = next((size for rule, size in RULES if re.search(rule, name)), value)
            if changed[name] == value and re.search(OTHER_COUNTS, name):
                changed[name] = min(value, 2)
    if "kv_lora_rank" in given:  # latent attention has keys and values for every head
        changed["num_key_value_heads"] = changed.get("num_attention_heads")
    if given.get("use_sliding_window") is False:
        changed |= {"use_sliding_window": True, "sliding_window": WINDOW}
    if "is_decoder" in given and not given.get("is_encoder_decoder"):
        changed["is_decoder"] = True
    changed |= deepcopy(EXCEPTIONS.get(default.model_type, {}))  # which configs change
    return {name: value for name, value in changed.items() if value != given.get(name, ...)}


def _count(given: dict[str, Any]) -> int:
    """The number of layers by default."""
    counts = [v for n, v in given.items() if re.search(LAYER_COUNTS, n) and isinstance(v, int)]
    return counts[0] if counts else 0


def _kept_layers(given: dict[str, Any]) -> list[int]:
    """One layer of each kind, by its index among those of the defaults, two at least."""
    count = _count(given)
    lists = [v for v in given.values() if isinstance(v, (list, tuple)) and len(v) == count > 0]
    kinds = [str([values[index] for values in lists]) for index in range(count)]
    first = [index for index in range(count) if kinds.index(kinds[index]) == index][:LAYERS]
    others = [index for index in range(count) if index not in first]
    return sorted(first + others[: max(0, 2 - len(first))])


def _rope(rope: dict) -> dict:
    """Rotary parameters that change with length within a short text."""
    if all(isinstance(value, dict) for value in rope.values()):
        return {name: _rope(value) for name, value in rope.items()}
    rope = dict(rope)
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = ORIGINAL_LENGTH
    if "mrope_section" in rope:
        rope["mrope_section"] = [2, 1, 1]
    return rope
