"""Export of EAGLE-3 drafters: what vLLM and SGLang read of one.

In: a drafter. Out: the `Content` of an engine's folder, or why the drafter would predict something
else there. From the engines' own sources: vLLM 0.32 (`llama_eagle3.py`, `qwen3_eagle3.py`), SGLang
0.5.23 (`llama_eagle3.py`).

              hidden states of the target             embeddings
    vllm      listed, any before the final norm       its own, or the target's
    sglang    listed by the layers that made them     the target's, unless of another width
"""

from typing import Any

import torch
from torch import Tensor

from ..drafters.eagle3 import Eagle3Config, Eagle3Drafter, ParallelConfig, default_layers
from ..target import Scales, Target
from .eagle import EMBEDDINGS, is_plain, table_scale
from .eagle3 import EMBEDDING, LAYERS, SWITCHES, TOKEN
from .engines import Content, engine_config, obstacles, those_true
from .files import renamed

BIASES = ("attention_bias", "output_bias", "mlp_bias", "qk_norm")
# fields of the config that an engine's drafters do not have
MISSING = {
    "vllm": ("fc_bias",),
    "sglang": ("fc_bias", *BIASES, "norm_before_residual"),
}
# targets of which SGLang counts the listed layers otherwise
COUNTED_OTHERWISE = ("gpt_oss", "deepseek", "kimi", "glm4_moe_lite")


def eagle3_content(drafter: Eagle3Drafter, engine: str, target: Target, vocab_size: int) -> Content:
    """Gather what an engine's folder holds of a drafter.

    `vocab_size` is the target's, which may have grown or shrunk since.
    """
    config, state, scale = drafter.config, drafter.state_dict(), table_scale(target)
    tensors = {name: state[name] for name in state if not name.startswith("heads.")}
    mask = tensors.pop(EMBEDDING, None)
    if engine == "vllm" or scale != 1.0:  # else SGLang feeds it the target's own table
        tensors.setdefault(EMBEDDINGS, target.embeddings.weight * scale)
    reasons = _reasons(drafter, engine, vocab_size)
    reasons += _table_reasons(tensors.get(EMBEDDINGS), engine, target, config, vocab_size)
    if isinstance(config, ParallelConfig):
        reasons += _mask_reasons(engine, config, vocab_size)
        if mask is not None and not reasons:
            table = tensors[EMBEDDINGS] = tensors[EMBEDDINGS].detach().clone()
            table[config.mask_token_id] = mask.reshape(-1).to(table)
    if config.draft_vocab_size == vocab_size:
        # engines give a whole vocabulary no maps: the rows are in the order of the tokens
        del tensors["d2t"], tensors["t2d"]
        tensors["lm_head.weight"] = drafter.lm_head.weight[drafter.draft_tokens.argsort()]
    else:
        tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool)
        tensors["t2d"][drafter.draft_tokens[drafter.draft_tokens < vocab_size].cpu()] = True
    if engine == "sglang":
        tensors = renamed(tensors, {r"^layers\.0\.": "midlayer."})
    elif config.attention_bias or config.output_bias:
        # vLLM's attention has all four biases or none
        for name in [name for name in tensors if name.endswith("_proj.weight") and "attn" in name]:
            zero = torch.zeros_like(tensors[name][:, 0])
            tensors.setdefault(name.replace("weight", "bias"), zero)
    return Content(_fields(config, engine, vocab_size), tensors, reasons)


def _reasons(drafter: Eagle3Drafter, engine: str, vocab_size: int) -> list[str]:
    """List why a drafter would predict something else in an engine."""
    config, is_sglang = drafter.config, engine == "sglang"
    layers, depth, family = config.target_layers, config.target_num_layers, config.target_model_type
    lacks = [name for name in MISSING[engine] if getattr(config, name)]
    is_listed_for_sglang = is_sglang and not _is_default(config)
    return obstacles(config, Scales(), engine, has_fc_bias=False) + those_true(
        {
            f"{engine}'s EAGLE-3 drafters have no {', '.join(lacks)}": lacks,
            f"`num_hidden_layers` is {config.num_hidden_layers}, and SGLang runs one": (
                is_sglang and config.num_hidden_layers > 1
            ),
            f"some of its draft tokens are beyond the target's {vocab_size} tokens": (
                (drafter.draft_tokens >= vocab_size).any()
            ),
            "`target_num_layers` is not known; set it in the drafter's config": depth is None,
            f"`target_layers` are {layers}, and engines read each once, lowest first": (
                layers != sorted(set(layers))
            ),
            f"it reads hidden state {depth} after the final norm, engines before it": (
                depth in layers
            ),
            "it reads the target's embeddings as a hidden state, which SGLang has not": (
                is_listed_for_sglang and layers[0] == 0
            ),
            f"SGLang counts the layers of a {family} target otherwise": (
                is_listed_for_sglang and str(family).startswith(COUNTED_OTHERWISE)
            ),
        }
    )


def _is_default(config: Eagle3Config) -> bool:
    """Whether a drafter reads the hidden states that every engine reads where none are listed."""
    depth = config.target_num_layers or 0
    return depth >= 7 and list(config.target_layers) == default_layers(depth)


def _table_reasons(
    table: Tensor | None, engine: str, target: Target, config: Eagle3Config, vocab_size: int
) -> list[str]:
    """List why an engine would feed other embeddings than `table`, (vocab, hidden)."""
    if table is None:
        return []
    if len(table) != vocab_size:
        return [f"its embeddings have {len(table)} rows for {vocab_size} tokens"]
    own = target.embeddings.weight
    is_own = is_plain(own) and own.shape == table.shape and table.equal(own.to(table))
    is_fed = engine == "sglang" and config.target_hidden_size == config.hidden_size
    return ["SGLang feeds it the target's embeddings, not its own"] if is_fed and not is_own else []


def _mask_reasons(engine: str, config: ParallelConfig, vocab_size: int) -> list[str]:
    """List why an engine would read other masks."""
    token, count = config.mask_token_id, len(config.target_layers)
    is_other_width = config.target_hidden_size != config.hidden_size
    return those_true(
        {
            f"{engine} drafts no tokens in parallel": engine != "vllm",
            f"`mask_token_id` is {token}; set it to a token below {vocab_size} of no text": (
                token is None or token >= vocab_size
            ),
            "vLLM takes a shared hidden state of three layers of the drafter's own width": (
                count != 3 or is_other_width
            ),
        }
    )


def _fields(config: Eagle3Config, engine: str, vocab_size: int) -> dict[str, Any]:
    """Write the fields of an engine's config.json."""
    fields = engine_config(config, Scales(), engine)
    fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}
    fields |= {"vocab_size": vocab_size, "draft_vocab_size": config.draft_vocab_size}
    fields |= {"target_hidden_size": config.target_hidden_size, "attention_bias": False}
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
