"""Formats of vLLM and SGLang: config fields, tensor names, limits.

In: a drafter's config and its target's scales. Out: the config.json of an engine, and what the
engine cannot express. From the engines' own sources: vLLM 0.33 (`llama_eagle.py`), SGLang 0.5.23
(`llama_eagle.py`, `qwen2_eagle.py`).

                   fc.bias       q/k/v bias         logit scale   softcap
    vllm           none          qkv_bias           logit_scale   none
    sglang         always        as a Qwen2 layer   none          a field
"""

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..drafters.configuration import DrafterConfig, FamilyConfig
from ..target import Scales

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"),
)
ROTARY = ("default", "linear", "dynamic", "yarn", "llama3")


class Content(NamedTuple):
    """What an engine's folder holds of a drafter."""

    fields: dict[str, Any]  # of config.json
    tensors: dict[str, Tensor]
    reasons: list[str]  # why the drafter would predict something else there


def engine_config(config: DrafterConfig, scales: Scales, engine: str) -> dict[str, Any]:
    """Write the fields of an engine's config.json; [`obstacles`] lists what they leave out."""
    fields = {name: getattr(config, name) for name in SIZES}
    fields |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    fields |= {"tie_word_embeddings": False, "attention_bias": False}
    # in the forms of transformers 5 and 4; engines read either
    rope = dict(config.rope_parameters or {})
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    is_scaled = rope["rope_type"] != "default"
    fields |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    fields["rope_scaling"] = scaling if is_scaled else None
    if engine == "sglang":
        # its Llama with q/k/v biases has one in o_proj
        family = "Qwen2" if config.attention_bias else "Llama"
        fields["architectures"] = [f"{family}ForCausalLMEagle"]
        if config.attention_bias:
            fields |= {"model_type": "qwen2", "attention_bias": True, "use_sliding_window": False}
        if scales.softcap is not None:
            fields["final_logit_softcapping"] = scales.softcap
        return fields
    fields |= {"qkv_bias": True} if config.attention_bias else {}
    return fields | ({"logit_scale": scales.logit} if scales.logit != 1.0 else {})


def obstacles(config: DrafterConfig, scales: Scales, engine: str, has_fc_bias: bool) -> list[str]:
    """List why a drafter would predict something else in an engine.

    `has_fc_bias`: whether `fc` has a bias that is not 0.
    """
    rope = config.rope_parameters or {}
    is_rotated = rope["rope_type"] in ROTARY and rope.get("partial_rotary_factor", 1.0) == 1.0
    return those_true(
        {
            "`fc.bias` is not 0, and vLLM's drafters have none (SGLang's do)": (
                engine == "vllm" and has_fc_bias
            ),
            f"only vLLM's drafters scale logits, as the target does by {scales.logit}": (
                engine != "vllm" and scales.logit != 1.0
            ),
            f"only SGLang's drafters cap logits, as the target does at {scales.softcap}": (
                engine != "sglang" and scales.softcap is not None
            ),
            f"`hidden_act` is {config.hidden_act!r}, and the engine's is 'silu'": (
                config.hidden_act != "silu"
            ),
            f"its rotary embedding {rope} is none of the engine's {ROTARY}": not is_rotated,
        }
    )


def those_true(reasons: dict[str, Any]) -> list[str]:
    """List the reasons that hold."""
    return [reason for reason, is_so in reasons.items() if is_so]


def serving_command(config: FamilyConfig, engine: str, folder: Path) -> str:
    """Return the command that serves the drafter, with the engine's usual lengths of drafts."""
    target, num_heads = config.target_name_or_path or "TARGET", getattr(config, "num_heads", None)
    eagle = "eagle3" if hasattr(config, "draft_vocab_size") else "eagle"
    if engine == "sglang":
        # a tree of five levels
        options = {"algorithm": eagle.upper(), "draft-model-path": str(folder)}
        options |= {"num-steps": "5", "eagle-topk": "8", "num-draft-tokens": "32"}
        words = ["python", "-m", "sglang.launch_server", "--model-path", target]
        return shlex.join(
            words + [word for name in options for word in (f"--speculative-{name}", options[name])]
        )
    settings: dict[str, Any] = {"method": "medusa" if num_heads else eagle, "model": str(folder)}
    settings["num_speculative_tokens"] = num_heads or 3
    if hasattr(config, "mask_token_id"):  # of a parallel drafter
        settings |= {"num_speculative_tokens": 5, "parallel_drafting": True}
    return shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(settings)])
