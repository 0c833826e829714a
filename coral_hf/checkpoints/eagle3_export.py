"""Export of EAGLE-3 drafters: what vLLM, SGLang and EAGLE's own code read of one.

In: a drafter. Out: the `Content` of an engine's folder, or why the drafter would predict something
else there. From the engines' own sources: vLLM 0.32 (`llama_eagle3.py`, `qwen3_eagle3.py`), SGLang
0.5.23 (`llama_eagle3.py`), EAGLE 3.0 (`cnets.py`).

              hidden states of the target             embeddings
    vllm      listed, any before the final norm       its own, or the target's
    sglang    listed by the layers that made them     the target's, unless of another width
    eagle     inputs of layers 2, L // 2, L - 3       its own, or the target's
"""

import re
from typing import Any

import torch
from torch import Tensor

from ..drafters.eagle3 import Eagle3Config, Eagle3Drafter, ParallelConfig, default_layers
from ..target import Scales, Target
from .eagle import EMBEDDINGS, is_plain
from .eagle3 import EMBEDDING, LAYERS, SWITCHES, TOKEN
from .engines import Content, engine_config, obstacles

BIASES = ("attention_bias", "output_bias", "mlp_bias", "qk_norm")
# fields of the config that an engine's drafters do not have
MISSING = {
    "vllm": ("fc_bias",),
    "sglang": ("fc_bias", *BIASES, "norm_before_residual"),
    "eagle": ("fc_bias", *BIASES, *SWITCHES),
}
# targets of which SGLang counts the listed layers otherwise
COUNTED_OTHERWISE = ("gpt_oss", "deepseek", "kimi", "glm4_moe_lite")


def eagle3_content(
    drafter: Eagle3Drafter, engine: str, target: Target | None, scale: float, vocab_size: int
) -> Content:
    """Gather what an engine's folder holds of a drafter.

    Args:
        target: the drafter's own, if it is at hand.
        scale: what the target's first layer sees, as a multiple of its table's row.
        vocab_size: of the target, which may have grown or shrunk since.
    """
    config, state = drafter.config, drafter.state_dict()
    tensors = {name: state[name] for name in state if not name.startswith("heads.")}
    is_fed = engine == "sglang" and scale == 1.0  # the engine feeds it the target's own table
    if EMBEDDINGS not in tensors and target is not None and not is_fed:
        tensors[EMBEDDINGS] = target.embeddings.weight * scale
    mask, table = tensors.pop(EMBEDDING, None), tensors.get(EMBEDDINGS)
    reasons = _reasons(drafter, engine, vocab_size)
    if config.has_embeddings or scale != 1.0:
        reasons += _table_reasons(table, engine, target, config, vocab_size)
    if isinstance(config, ParallelConfig):
        reasons += _mask_reasons(table, engine, config, vocab_size)
        if mask is not None and table is not None and not reasons:
            tensors[EMBEDDINGS] = table.detach().clone()
            tensors[EMBEDDINGS][config.mask_token_id] = mask.reshape(-1).to(table)
    if config.draft_vocab_size == vocab_size:
        # engines give a whole vocabulary no maps: the rows are in the order of the tokens
        del tensors["d2t"], tensors["t2d"]
        tensors["lm_head.weight"] = drafter.lm_head.weight[drafter.draft_tokens.argsort()]
    else:
        tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool)
        tensors["t2d"][drafter.draft_tokens[drafter.draft_tokens < vocab_size].cpu()] = True
    if engine != "vllm":
        tensors = {re.sub(r"^layers\.0\.", "midlayer.", n): one for n, one in tensors.items()}
    elif config.attention_bias or config.output_bias:
        # vLLM's attention has all four biases or none
        for name in [name for name in tensors if name.endswith("_proj.weight") and "attn" in name]:
            zero = torch.zeros_like(tensors[name][:, 0])
            tensors.setdefault(name.replace("weight", "bias"), zero)
    return Content(_fields(config, engine, vocab_size), tensors, reasons, [])


def _reasons(drafter: Eagle3Drafter, engine: str, vocab_size: int) -> list[str]:
    """List why a drafter would predict something else in an engine."""
    config, is_sglang = drafter.config, engine == "sglang"
    layers, depth, family = config.target_layers, config.target_num_layers, config.target_model_type
    lacks = [name for name in MISSING[engine] if getattr(config, name)]
    num_layers, is_listed = config.num_hidden_layers, not _is_default(config)
    is_counted_otherwise = str(family).startswith(COUNTED_OTHERWISE)
    reasons = {
        f"{engine}'s EAGLE-3 drafters have no {', '.join(lacks)}": lacks,
        f"`num_hidden_layers` is {num_layers}, and {engine} runs one": (
            engine != "vllm" and num_layers > 1
        ),
        f"some of its draft tokens are beyond the target's {vocab_size} tokens": bool(
            (drafter.draft_tokens >= vocab_size).any()
        ),
        "`target_num_layers` is not known; set it in the drafter's config": depth is None,
        f"`target_layers` are {layers}, and engines read each once, lowest first": (
            layers != sorted(set(layers))
        ),
        f"it reads hidden state {depth} after the final norm, engines before it": depth in layers,
        f"`target_layers` are {layers}, and EAGLE's code reads [2, L // 2, L - 3]": (
            engine == "eagle" and is_listed
        ),
        "it reads the target's embeddings as a hidden state, which SGLang has not": (
            is_sglang and is_listed and layers[0] == 0
        ),
        f"SGLang counts the layers of a {family} target otherwise": (
            is_sglang and is_listed and is_counted_otherwise
        ),
    }
    found = obstacles(config, Scales(), engine, has_fc_bias=False)
    return found + [reason for reason, is_so in reasons.items() if is_so]


def _is_default(config: Eagle3Config) -> bool:
    """Whether a drafter reads the hidden states that every engine reads where none are listed."""
    depth = config.target_num_layers or 0
    return depth >= 7 and list(config.target_layers) == default_layers(depth)


def _table_reasons(
    table: Tensor | None, engine: str, target: Target | None, config: Eagle3Config, vocab_size: int
) -> list[str]:
    """List why an engine would feed other embeddings than `table`, (vocab, hidden)."""
    if table is not None and len(table) != vocab_size:
        return [f"its embeddings have {len(table)} rows for {vocab_size} tokens"]
    if engine != "sglang" or config.target_hidden_size != config.hidden_size:
        return []
    if target is None:
        return ["SGLang feeds it the target's embeddings, not its own: `target` tells them apart"]
    own = target.embeddings.weight
    if table is not None and is_plain(own) and table.equal(own.to(table.device, table.dtype)):
        return []
    return ["SGLang feeds it the target's embeddings, not its own"]


def _mask_reasons(
    table: Tensor | None, engine: str, config: ParallelConfig, vocab_size: int
) -> list[str]:
    """List why the mask embedding cannot go into an engine's table, (vocab, hidden)."""
    token, found = config.mask_token_id, []
    if engine != "vllm":
        return [f"{engine} drafts no tokens in parallel"]
    if token is None or token >= vocab_size:
        found.append(f"`mask_token_id` is {token}; set it to a token below {vocab_size} of no text")
    if table is None:
        found.append("its mask embedding goes into the target's, so pass `target` (--target)")
    if len(config.target_layers) != 3 or config.target_hidden_size != config.hidden_size:
        found.append("vLLM takes a shared hidden state of three layers of the drafter's own width")
    return found


def _fields(config: Eagle3Config, engine: str, vocab_size: int) -> dict[str, Any]:
    """Write the fields of an engine's config.json."""
    fields = engine_config(config, Scales(), engine, has_fc_bias=False)
    fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}
    fields |= {"vocab_size": vocab_size, "draft_vocab_size": config.draft_vocab_size}
    fields |= {"target_hidden_size": config.target_hidden_size, "attention_bias": False}
    if engine == "eagle":
        return fields | {"architectures": ["LlamaForCausalLM"]}
    fields |= {name: getattr(config, name) for name in SWITCHES}
    if isinstance(config, ParallelConfig):
        fields[TOKEN] = config.mask_token_id
    layers, count = list(config.target_layers), len(config.target_layers)
    if engine == "vllm":
        fields |= {LAYERS: layers, "num_aux_hidden_states": count, "mlp_bias": config.mlp_bias}
        fields["attention_bias"] = config.attention_bias or config.output_bias
        fields.pop("qkv_bias", None)
        if config.qk_norm:
            fields |= {"model_type": "qwen3", "architectures": ["Eagle3Qwen3ForCausalLM"]}
        return fields
    fields["eagle_config"] = {"use_aux_hidden_state": True}
    if not _is_default(config):
        fields["eagle_config"][LAYERS] = [layer - 1 for layer in layers]
    return fields
