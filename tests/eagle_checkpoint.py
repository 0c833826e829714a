"""Checkpoints as EAGLE's training writes them, and what such a drafter computes, from raw tensors.

Written from the formulas (docs/use/serve.md) in plain torch: nothing of the package is in it.
"""

import json
import math

import torch
from safetensors.torch import save_file

VOCAB, HIDDEN, INNER = 40, 32, 48
LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float16",
}
VICUNA = {k: v for k, v in LLAMA2.items() if k != "num_key_value_heads"}
LLAMA3 = {**LLAMA2, "num_key_value_heads": 2, "rope_theta": 500000.0, "bias": False}
LLAMA3 |= {"rms_norm_eps": 1e-5}
MIXTRAL = {**LLAMA2, "model_type": "mixtral", "rope_scaling": None}
QWEN2 = {**LLAMA3, "model_type": "qwen2", "rope_theta": 1000000.0, "qkv_bias": True}
FAMILIES = {  # the target's family, and the config of its drafter
    "llama2": ("llama", LLAMA2),
    "vicuna": ("llama", VICUNA),
    "llama3": ("llama", LLAMA3),
    "mixtral": ("mixtral", MIXTRAL),
    "qwen2": ("qwen2", QWEN2),
}


def eagle_tensors(config: dict, dtype=torch.float32, seed=2) -> dict[str, torch.Tensor]:
    """Random tensors of the names and shapes of EAGLE's `cnets1.py`."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_width = config.get("num_key_value_heads", heads) * (hidden // heads)
    shapes = {"fc.weight": (hidden, 2 * hidden)}
    if config.get("bias", True):
        shapes["fc.bias"] = (hidden,)
    for layer in range(config["num_hidden_layers"]):
        own = {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.k_proj.weight": (kv_width, hidden),
            "self_attn.v_proj.weight": (kv_width, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "post_attention_layernorm.weight": (hidden,),
        }
        if config.get("qkv_bias"):
            own |= {"self_attn.q_proj.bias": (hidden,)}
            own |= {f"self_attn.{name}_proj.bias": (kv_width,) for name in "kv"}
        if layer > 0:
            own["input_layernorm.weight"] = (hidden,)
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in own.items()}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.4 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }


def write_checkpoint(folder, config: dict, tensors: dict, weights="pytorch_model.bin") -> None:
    """One file; `tensors` that are None are left out."""
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (torch.save if weights.endswith(".bin") else save_file)(kept, folder / weights)


def write_shards(folder, config: dict, shards: list[dict], kind="safetensors", **index) -> None:
    """A file for each of `shards`, and their index; `index` replaces what it says."""
    stem, save = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    files = [f"{stem}-0000{n + 1}-of-0000{len(shards)}.{kind}" for n in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        save(tensors, folder / file)
    places = {name: f for f, tensors in zip(files, shards, strict=True) for name in tensors}
    content = {"metadata": {}, "weight_map": {**places, **index}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(content))


def eagle_step(config: dict, tensors: dict, embeddings, features):
    """The drafter's predictions, in float64, by the formulas of EAGLE's drafter.

    h = fc [e(x_{t+1}); f_t]; h += Attention(h); h += SwiGLU(RMSNorm(h)); all norms but the input
    norm of the first layer, none at the end.

    embeddings, features: (length, hidden). Returns: (length, hidden).
    """
    w = {name: tensor.double() for name, tensor in tensors.items()}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = heads // config.get("num_key_value_heads", heads)
    size, length = hidden // heads, len(features)

    def norm(x, name):
        mean = x.pow(2).mean(-1, keepdim=True)
        return x / (mean + config["rms_norm_eps"]).sqrt() * w[name]

    def turn(x):  # (length, heads, size): pairs (i, i + size / 2) rotate by position · θ_i
        half = size // 2
        theta = config.get("rope_theta", 10000.0) ** (-torch.arange(half).double() / half)
        angle = torch.arange(length).double()[:, None, None] * theta  # (length, 1, size / 2)
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ],
            -1,
        )

    h = torch.cat([embeddings.double(), features.double()], -1) @ w["fc.weight"].T
    h = h + w.get("fc.bias", 0.0)
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}."
        x = h if layer == 0 else norm(h, at + "input_layernorm.weight")

        def project(name, x=x, at=at):
            bias = w.get(f"{at}self_attn.{name}_proj.bias", 0.0)
            return (x @ w[f"{at}self_attn.{name}_proj.weight"].T + bias).view(length, -1, size)

        q, k, v = turn(project("q")), turn(project("k")), project("v")
        rows = []
        for head in range(heads):
            scores = q[:, head] @ k[:, head // groups].T / math.sqrt(size)
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
            rows.append(scores.softmax(-1) @ v[:, head // groups])
        h = h + torch.cat(rows, -1) @ w[at + "self_attn.o_proj.weight"].T
        x = norm(h, at + "post_attention_layernorm.weight")
        gate, up = x @ w[at + "mlp.gate_proj.weight"].T, x @ w[at + "mlp.up_proj.weight"].T
        h = h + (gate * gate.sigmoid() * up) @ w[at + "mlp.down_proj.weight"].T
    return h
