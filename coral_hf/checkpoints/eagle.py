"""Checkpoints of EAGLE-1, EAGLE-2 (Li et al. 2024) and HASS (Zhang et al. 2024).

In: a folder. Out: its tensors under our names, which are theirs, the copies of the target's, and
the shape of the drafter. What a config leaves out is what EAGLE takes then, not what transformers
gives to a model of that type: a Mixtral's drafter rotates with a base of 10,000, a Mixtral with
1,000,000.

    embedding (hidden) ┐
                       ├ fc (hidden, 2 hidden) ─ layers.0 without an input norm ─ next feature
    feature   (hidden) ┘
"""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..configuration_coral import CoralConfig
from .source import CONFIG, read_config, read_weights

EMBEDDINGS, HEAD = "embed_tokens.weight", "lm_head.weight"
INVERSE_FREQUENCIES = "rotary_emb.inv_freq"
FIRST = "layers.0.self_attn.q_proj.bias"
# what an EAGLE-3 drafter has and an EAGLE-1 drafter has not
EAGLE3_TENSORS = ("d2t", "t2d", "midlayer.", "hidden_norm.", "layers.0.hidden_norm.")


class EagleCheckpoint(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]  # of the drafter
    copies: dict[str, Tensor]  # (vocab, hidden) each, of the target: embeddings, LM head
    frequencies: dict[str, Tensor]  # (head_dim / 2,) each, of the rotary embedding
    shape: dict[str, Any]  # fields of `CoralConfig`


def read_eagle(folder: Path) -> EagleCheckpoint:
    """Read a checkpoint, without a look at whether it fits a target.

    Raises:
        ValueError: if a file is broken, a size is missing, or the drafter is EAGLE-3's.
    """
    config = read_config(folder)
    if config.get("model_type") == CoralConfig.model_type:
        raise ValueError(
            f"{folder} is a CORAL drafter already; load it with AutoModel.from_pretrained."
        )
    tensors = read_weights(folder)
    _refuse_eagle3(folder, config, tensors)
    copies = {name: tensors.pop(name) for name in (EMBEDDINGS, HEAD) if name in tensors}
    rotary = [name for name in tensors if name.endswith(INVERSE_FREQUENCIES)]
    frequencies = {name: tensors.pop(name) for name in rotary}
    return EagleCheckpoint(tensors, copies, frequencies, _shape(folder, config, tensors))


def _refuse_eagle3(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    found = sorted(name for name in tensors if name.startswith(EAGLE3_TENSORS))
    if not found and config.get("draft_vocab_size") is None:
        return
    raise ValueError(
        f"{folder} is an EAGLE-3 drafter ({', '.join(found[:3]) or '`draft_vocab_size`'}): it reads"
        " three of the target's layers and has norms and an LM head of its own, for which a CORAL"
        " drafter has no place. Import an EAGLE-1, EAGLE-2 or HASS drafter, or serve this one with"
        " vLLM or SGLang."
    )


def _shape(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of a drafter's own shape, with EAGLE's defaults."""
    if config.get("model_type") == "eagle" and isinstance(config.get("model"), dict):
        config = config["model"]  # an older layout of vLLM
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    missing = [name for name in sizes if not isinstance(config.get(name), int)]
    if missing:
        raise ValueError(
            f"{folder / CONFIG} lacks {', '.join(missing)}, which an EAGLE drafter's config has;"
            " add them, or give another checkpoint."
        )
    heads = config["num_attention_heads"]
    return {
        **{name: config[name] for name in sizes},
        "num_hidden_layers": config.get("num_hidden_layers", 1),
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "hidden_act": config.get("hidden_act", "silu"),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "rope_parameters": _rope(config),
        # a bias that the config promises and the file lacks is missing, and the other way round
        "fc_bias": config.get("bias", "fc.bias" in tensors),
        "attention_bias": config.get("qkv_bias", FIRST in tensors),
    }


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters in transformers' present form, from either form."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("type", "default")
    theta = float(config.get("rope_theta") or 10000.0)
    return {"rope_type": kind, "rope_theta": theta, **rope}


def check_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Raise a ValueError that names each tensor that does not fit.

    Args:
        found: tensors of a checkpoint or a layer.
        wanted: tensors of the names and shapes that there should be.
        what: the checkpoint or layer, as a message begins.
    """
    both = sorted(wanted.keys() & found.keys())
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in both
            if found[name].shape != wanted[name].shape
        ],
        "not finite": [name for name in both if not found[name].isfinite().all()],
    }
    listed = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if listed:
        raise ValueError(
            f"{what} does not fit the drafter, which has EAGLE-1's shape; {'; '.join(listed)}."
            " Start from another source, or from random weights."
        )
