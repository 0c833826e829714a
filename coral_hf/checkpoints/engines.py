"""Formats of vLLM, SGLang and EAGLE's own code: config fields, tensor names, limits.

In: a drafter's config and its target's scales. Out: the config.json of an engine, and what the
engine cannot express. From the engines' own sources: vLLM
0.33 (`llama_eagle.py`), SGLang 0.5.23 (`llama_eagle.py`, `qwen2_eagle.py`), EAGLE 3.0
(`cnets1.py`).

                   fc.bias       q/k/v bias         logit scale   softcap   rotary
    vllm           none          qkv_bias           logit_scale   none      ROTARY
    sglang         always        as a Qwen2 layer   none          a field   ROTARY
    eagle          as it says    qkv_bias           none          none      default, or base 10,000
"""

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..drafters.configuration import DrafterConfig, FamilyConfig
from ..target import Scales

HOT_TOKENS = "hot_tokens.pt"  # ids of the tokens that SGLang's drafter may read alone
ENGINES = ("vllm", "sglang", "eagle")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
ROTARY = ("default", "linear", "dynamic", "yarn", "llama3")
# EAGLE's own code rotates with this base whenever its `rope_scaling` is set
EAGLE_BASE = 10000.0


class Content(NamedTuple):
    """What an engine's folder holds of a drafter."""

    fields: dict[str, Any]  # of config.json
    tensors: dict[str, Tensor]
    reasons: list[str]  # why the drafter would predict something else there
    notes: list[str]  # what else is different there


def engine_config(
    config: DrafterConfig, scales: Scales, engine: str, has_fc_bias: bool
) -> dict[str, Any]:
    """Write the fields of an engine's config.json; [`obstacles`] lists what they leave out.

    Args:
        has_fc_bias: whether `fc` has a bias that is not 0.
    """
    fields = {name: getattr(config, name) for name in SIZES}
    fields |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    fields |= {"tie_word_embeddings": False, "attention_bias": False}
    fields |= _rotary_fields(config, engine)
    if engine == "sglang":
        fields |= _sglang_fields(config, scales)
    elif config.attention_bias:
        fields["qkv_bias"] = True
    if engine == "vllm" and scales.logit != 1.0:
        fields["logit_scale"] = scales.logit
    if engine == "eagle":
        fields["bias"] = has_fc_bias
    return fields


def _sglang_fields(config: DrafterConfig, scales: Scales) -> dict[str, Any]:
    """Return the fields that name SGLang's class; its Llama with q/k/v biases has one in o_proj."""
    family = "Qwen2" if config.attention_bias else "Llama"
    fields: dict[str, Any] = {"architectures": [f"{family}ForCausalLMEagle"]}
    if config.attention_bias:
        fields |= {"model_type": "qwen2", "attention_bias": True, "use_sliding_window": False}
    if scales.softcap is not None:
        fields["final_logit_softcapping"] = scales.softcap
    return fields


def _rotary_fields(config: DrafterConfig, engine: str) -> dict[str, Any]:
    """Return rotary parameters in the forms of transformers 5 and 4; engines read either."""
    assert config.rope_parameters, "the config fills them in"
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    if engine == "eagle":
        if scaling is not None:
            scaling = {"type": scaling["rope_type"], "factor": float(scaling["factor"])}
        return {"rope_theta": theta, "rope_scaling": scaling}
    both = {"rope_theta": theta, "rope_scaling": scaling}
    return {"rope_parameters": {**rope, "rope_theta": theta}, **both}


def obstacles(config: DrafterConfig, scales: Scales, engine: str, has_fc_bias: bool) -> list[str]:
    """List why a drafter would predict something else in an engine."""
    found = []
    if engine == "vllm" and has_fc_bias:
        found.append("`fc.bias` is not 0, and vLLM's drafters have none (SGLang's do)")
    if engine != "vllm" and scales.logit != 1.0:
        found.append(f"only vLLM's drafters scale logits, as the target does by {scales.logit}")
    if engine != "sglang" and scales.softcap is not None:
        found.append(f"only SGLang's drafters cap logits, as the target does at {scales.softcap}")
    if engine != "eagle" and config.hidden_act != "silu":
        found.append(f"`hidden_act` is {config.hidden_act!r}, and the engine's is 'silu'")
    assert config.rope_parameters, "the config fills them in"
    rope, kinds = config.rope_parameters, ROTARY[:3] if engine == "eagle" else ROTARY
    if rope["rope_type"] not in kinds or rope.get("partial_rotary_factor", 1.0) != 1.0:
        found.append(f"its rotary embedding {rope} is none of the engine's {kinds}")
    elif engine == "eagle" and rope["rope_type"] != "default" and rope["rope_theta"] != EAGLE_BASE:
        found.append(
            f"EAGLE's code rotates with a base of {EAGLE_BASE} where positions are scaled, the"
            f" drafter with {rope['rope_theta']}"
        )
    if engine == "eagle" and config.head_dim != config.hidden_size // config.num_attention_heads:
        found.append(
            f"`head_dim` is {config.head_dim}, and EAGLE's code takes `hidden_size` /"
            " `num_attention_heads`"
        )
    return found


def serving_command(
    config: FamilyConfig, engine: str, output: Path, num_hot_tokens: int | None
) -> str:
    """Return the command that serves the drafter, with the engine's usual lengths of drafts."""
    target, folder = config.target_name_or_path or "TARGET", str(output)
    draft_vocab, num_heads = (getattr(config, n, None) for n in ("draft_vocab_size", "num_heads"))
    method = "medusa" if num_heads else "eagle" if draft_vocab is None else "eagle3"
    if engine == "redrafter":
        paths = {"hf_tokenizer": target, "hf_llm": target, "hf_drafter": folder}
        options = [f"--{name}={path}" for name, path in paths.items()]
        return shlex.join(["python", "-m", "recurrent_drafting.cmd.generate", *options])
    if engine == "medusa":
        return shlex.join(["python", "-m", "medusa.inference.cli", "--model", folder])
    if engine == "eagle":
        path = f"base_model_path={target!r}, ea_model_path={folder!r}"
        return f"EaModel.from_pretrained({path}, use_eagle3={method == 'eagle3'})"
    if engine == "vllm":
        settings = {"method": method, "model": folder, "num_speculative_tokens": num_heads or 3}
        if hasattr(config, "mask_token_id"):  # of a parallel drafter
            settings |= {"num_speculative_tokens": 5, "parallel_drafting": True}
        return shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(settings)])
    parts = ["python", "-m", "sglang.launch_server", "--model-path", target]
    parts += ["--speculative-algorithm", method.upper(), "--speculative-draft-model-path", folder]
    top_k = min(8, draft_vocab or num_hot_tokens or config.vocab_size)
    # a tree holds its root, then as many nodes as 5 levels of it can have
    nodes = min(32, 1 + top_k + 4 * top_k**2)
    parts += ["--speculative-num-steps", "5", "--speculative-eagle-topk", str(top_k)]
    parts += ["--speculative-num-draft-tokens", str(nodes)]
    if num_hot_tokens is not None:
        parts += ["--speculative-token-map", str(output / HOT_TOKENS)]
    return shlex.join(parts)
