"""EAGLE-3 checkpoints of four layouts, and what such a drafter computes, from raw tensors.

Names and shapes as published, formulas from docs/use/eagle3.md: nothing of the package is in it.
"""

import math

import torch
from eagle_checkpoint import HIDDEN, INNER, VOCAB

DRAFT, DEPTH = 16, 8  # tokens of the draft vocabulary, layers of the target
# of the target's `hidden_states`, where a checkpoint says nothing
PUBLISHED = [2, DEPTH // 2, DEPTH - 3]
SAFEAI = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": VOCAB,
    "draft_vocab_size": DRAFT,
}
SPECFORGE = {
    **SAFEAI,
    "architectures": ["LlamaForCausalLMEagle3"],
    "attention_bias": False,
    "head_dim": 8,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "eagle_config": {
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],  # outputs
        "use_aux_hidden_state": True,
    },
}
MODELOPT = {
    **SPECFORGE,
    "rope_theta": 500000.0,
    "eagle_config": {
        "eagle_aux_hidden_state_layer_ids": [2, 4, 6],  # outputs
        "use_aux_hidden_state": True,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "norm_before_fc": True,
    },
}
SPECULATORS = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "speculators_version": "0.9.0",
    "draft_vocab_size": DRAFT,
    "target_hidden_size": None,
    "norm_before_residual": True,
    "eagle_aux_hidden_state_layer_ids": [1, 4, 6],
    "speculators_config": {"verifier": {"name_or_path": "org/llama", "architectures": []}},
    "transformer_layer_config": {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
        "rope_theta": 10000.0,
    },
}
QWEN3 = {
    **SPECULATORS,
    "norm_before_residual": False,
    "transformer_layer_config": {
        **SPECULATORS["transformer_layer_config"],
        "model_type": "qwen3",
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
    },
}
V31 = {**SPECULATORS, "norm_before_residual": False, "fc_norm": True, "norm_output": True}
KIMI = {**SPECFORGE, "eagle_config": {"eagle_aux_hidden_state_layer_ids": PUBLISHED}}
WIDER = {**SPECFORGE, "target_hidden_size": HIDDEN, "hidden_size": 24, "head_dim": 6}
# what a layout says where the formulas need it: prefix of the first layer, hidden states of the
# target, base of the rotary embedding, extra tensors
LAYOUTS = {
    "SafeAILab": (SAFEAI, "midlayer.", PUBLISHED, 10000.0),
    "SpecForge": (SPECFORGE, "midlayer.", [2, 4, 6], 1000000.0),
    "SpecForge, narrower": (WIDER, "midlayer.", [2, 4, 6], 1000000.0),
    "SpecForge, inputs": (KIMI, "midlayer.", PUBLISHED, 1000000.0),
    "Model-Optimizer": (MODELOPT, "layers.0.", [3, 5, 7], 500000.0),
    "speculators": (SPECULATORS, "layers.0.", [1, 4, 6], 10000.0),
    "speculators, Qwen3": (QWEN3, "layers.0.", [1, 4, 6], 10000.0),
    "speculators, 3.1": (V31, "layers.0.", [1, 4, 6], 10000.0),
}


def flat(config: dict) -> dict:
    """The fields of the layer and the switches, wherever a layout has them."""
    return {
        "rms_norm_eps": 1e-6,
        **config.get("transformer_layer_config", {}),
        **config,
        **config.get("eagle_config", {}),
    }


def eagle3_tensors(config: dict, first: str, *, seed=2, biases=()) -> dict[str, torch.Tensor]:
    """Random tensors of the names and shapes of a layout."""
    c = flat(config)
    hidden, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    wide = c.get("target_hidden_size") or hidden
    size = c.get("head_dim", hidden // heads)
    q, kv = heads * size, c["num_key_value_heads"] * size
    own = {
        "self_attn.q_proj.weight": (q, 2 * hidden),
        "self_attn.k_proj.weight": (kv, 2 * hidden),
        "self_attn.v_proj.weight": (kv, 2 * hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "hidden_norm.weight": (hidden,),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if c["model_type"] == "qwen3":
        own |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
    shapes = {
        "fc.weight": (hidden, 3 * wide),
        **{first + name: shape for name, shape in own.items()},
        "norm.weight": (hidden,),
        "lm_head.weight": (DRAFT, hidden),
    }
    if c.get("norm_before_fc"):
        shapes["input_norm.weight"] = (3 * wide,)
    if c.get("fc_norm"):
        shapes |= {f"fc_norm.{index}.weight": (wide,) for index in range(3)}
    if hidden != wide:
        shapes["embed_tokens.weight"] = (VOCAB, hidden)
    for name in biases:  # a projection's, as wide as its output
        name = name.replace("first.", first)
        shapes[f"{name}.bias"] = shapes[f"{name}.weight"][:1]
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (0.4 * torch.randn(shape, generator=generator) + name.endswith("norm.weight"))
        for name, shape in shapes.items()
    }
    tokens = torch.randperm(VOCAB, generator=generator)[:DRAFT].sort().values
    tensors["d2t"] = tokens - torch.arange(DRAFT)
    tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, tokens, True)
    if first == "layers.0." and "eagle_config" in config:  # Model-Optimizer writes no mask
        del tensors["t2d"]
    return tensors


def eagle3_step(config: dict, first: str, theta: float, tensors: dict, embeddings, hidden):
    """One causal pass of the drafter in float64, by the formulas of EAGLE-3.

    r = h, or RMSNorm(h) where `norm_before_residual`; a = r + Attention([RMSNorm(e); RMSNorm(h)]);
    a += SwiGLU(RMSNorm(a)); the logits are lm_head(RMSNorm(a)).

    embeddings, hidden: (length, hidden). Returns: what the next step reads, and the logits,
    (length, hidden) and (length, draft_vocab).
    """
    c, w = flat(config), {name: tensor.double() for name, tensor in tensors.items()}
    heads, groups = c["num_attention_heads"], c["num_attention_heads"] // c["num_key_value_heads"]
    size, length = c.get("head_dim", c["hidden_size"] // heads), len(hidden)

    def norm(x, name):
        scale = (x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).rsqrt()
        return x * scale * w[name]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def turn(x):  # (length, heads, size): pairs (i, i + size / 2) rotate by position · θ_i
        half = size // 2
        angle = torch.arange(length).double()[:, None, None] * theta ** (
            -torch.arange(half).double() / half
        )
        left, right = x[..., :half], x[..., half:]
        turned = left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()
        return torch.cat(turned, -1)

    def project(name, normed):
        x = linear(both, f"{first}self_attn.{name}_proj").view(length, -1, size)
        return norm(x, f"{first}self_attn.{name}_norm.weight") if normed else x

    normed = norm(hidden, first + "hidden_norm.weight")
    both = torch.cat([norm(embeddings, first + "input_layernorm.weight"), normed], -1)
    has_norms = f"{first}self_attn.q_norm.weight" in w
    q, k, v = turn(project("q", has_norms)), turn(project("k", has_norms)), project("v", False)
    rows = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // groups].T / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        rows.append(scores.softmax(-1) @ v[:, head // groups])
    a = normed if c.get("norm_before_residual") else hidden
    a = a + linear(torch.cat(rows, -1), first + "self_attn.o_proj")
    x = norm(a, first + "post_attention_layernorm.weight")
    gate = linear(x, first + "mlp.gate_proj")
    a = a + linear(
        gate * gate.sigmoid() * linear(x, first + "mlp.up_proj"), first + "mlp.down_proj"
    )
    out = norm(a, "norm.weight")
    return out if c.get("norm_output") else a, out @ w["lm_head.weight"].T


def eagle3_fuse(config: dict, tensors: dict, features):
    """fc of three hidden states side by side, (length, 3 · target hidden), in float64."""
    c, w = flat(config), {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[name]

    if c.get("norm_before_fc"):
        features = norm(features, "input_norm.weight")
    if c.get("fc_norm"):
        parts = [norm(x, f"fc_norm.{n}.weight") for n, x in enumerate(features.chunk(3, -1))]
        features = torch.cat(parts, -1)
    return features @ w["fc.weight"].T + w.get("fc.bias", 0.0)
