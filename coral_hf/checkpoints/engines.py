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
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"),
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
    # in the forms of transformers 5 and 4; engines read either, EAGLE's code the second
    rope, scaling = config.rope_parameters or {}, None
    if rope["rope_type"] != "default":
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    if engine == "eagle":
        fields["bias"] = has_fc_bias
        if scaling is not None:
            scaling = {"type": rope["rope_type"], "factor": float(rope["factor"])}
    else:
        fields["rope_parameters"] = dict(rope)
    fields |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    if engine == "sglang":
        # its Llama with q/k/v biases has one in o_proj
        family = "Qwen2" if config.attention_bias else "Llama"
        fields["architectures"] = [f"{family}ForCausalLMEagle"]
        if config.attention_bias:
            fields |= {"model_type": "qwen2", "attention_bias": True, "use_sliding_window": False}
        if scales.softcap is not None:
            fields["final_logit_softcapping"] = scales.softcap
    elif config.attention_bias:
        fields["qkv_bias"] = True
    if engine == "vllm" and scales.logit != 1.0:
        fields["logit_scale"] = scales.logit
    return fields


def obstacles(config: DrafterConfig, scales: Scales, engine: str, has_fc_bias: bool) -> list[str]:
    """List why a drafter would predict something else in an engine."""
    is_eagle, rope = engine == "eagle", config.rope_parameters or {}
    kinds, kind = ROTARY[:3] if is_eagle else ROTARY, rope["rope_type"]
    is_rotated = kind in kinds and rope.get("partial_rotary_factor", 1.0) == 1.0
    is_other_base = kind != "default" and rope["rope_theta"] != EAGLE_BASE
    is_other_width = config.head_dim != config.hidden_size // config.num_attention_heads
    reasons = {
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
            not is_eagle and config.hidden_act != "silu"
        ),
        f"its rotary embedding {rope} is none of the engine's {kinds}": not is_rotated,
        f"EAGLE's code rotates with a base of {EAGLE_BASE} where positions are scaled, the drafter"
        f" with {rope['rope_theta']}": is_eagle and is_rotated and is_other_base,
        f"`head_dim` is {config.head_dim}, and EAGLE's code takes `hidden_size` /"
        " `num_attention_heads`": is_eagle and is_other_width,
    }
    return [reason for reason, is_so in reasons.items() if is_so]


def serving_command(
    config: FamilyConfig, engine: str, output: Path, num_hot_tokens: int | None
) -> str:
    """Return the command that serves the drafter, with the engine's usual lengths of drafts."""
    target, folder = config.target_name_or_path or "TARGET", str(output)
    draft_vocab, num_heads = (getattr(config, n, None) for n in ("draft_vocab_size", "num_heads"))
    method = "medusa" if num_heads else "eagle" if draft_vocab is None else "eagle3"
    if engine == "redrafter":
        paths = [f"--hf_tokenizer={target}", f"--hf_llm={target}", f"--hf_drafter={folder}"]
        return shlex.join(["python", "-m", "recurrent_drafting.cmd.generate", *paths])
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
