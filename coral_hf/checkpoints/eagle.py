"""Checkpoints of EAGLE-1, EAGLE-2 (Li et al. 2024) and HASS (Zhang et al. 2024).

In: a folder. Out: the sizes of the drafter, its tensors under our names, which are EAGLE's, and
what the checkpoint repeats of its target.

    embedding (hidden) ┐
                       ├ fc (hidden, 2 hidden) ─ layers.0 without an input norm ─ next feature
    feature   (hidden) ┘
"""

from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import CONFIG_NAME

from ..drafters.coral.configuration import CoralConfig
from .files import check_dense, read_config, read_weights

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
# what EAGLE takes where a config says nothing, which is not what transformers gives to a model of
# that type: a Mixtral's drafter rotates with a base of 10,000, a Mixtral with 1,000,000
DEFAULTS = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
ROPE_THETA = 10000.0
EMBEDDINGS, HEAD = "embed_tokens.weight", "lm_head.weight"
INVERSE_FREQUENCIES = "rotary_emb.inv_freq"
# where the config does not say whether there is a bias, these tensors do
BIASES = {"fc_bias": "fc.bias", "attention_bias": "layers.0.self_attn.q_proj.bias"}
# what an EAGLE-3 drafter has and an EAGLE-1 drafter has not
EAGLE3_TENSORS = ("d2t", "t2d", "midlayer.", "hidden_norm.", "layers.0.hidden_norm.")


class EagleCheckpoint(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]  # of the drafter
    copies: dict[str, Tensor]  # (vocab, hidden) each, of the target: embeddings, LM head
    frequencies: dict[str, Tensor]  # of shape (head_dim / 2,) each, of the rotary embedding
    shape: dict[str, Any]  # fields of `CoralConfig`


def read_eagle(folder: Path) -> EagleCheckpoint:
    """Read a checkpoint, without checking that it fits a target.

    Raises:
        ValueError: if a file is damaged, a field makes no sense, a tensor cannot be used, or the
            drafter is EAGLE-3's.
    """
    sizes, tensors = read_shape(folder), read_weights(folder)
    foreign = sorted(name for name in tensors if name.startswith(EAGLE3_TENSORS))
    if foreign:
        _refuse_eagle3(folder, ", ".join(foreign[:3]))
    check_dense(tensors, folder)
    copies = {name: tensors.pop(name) for name in (EMBEDDINGS, HEAD) if name in tensors}
    rotary = [name for name in tensors if name.endswith(INVERSE_FREQUENCIES)]
    frequencies = {name: tensors.pop(name) for name in rotary}
    shape = {field: name in tensors for field, name in BIASES.items()} | sizes
    return EagleCheckpoint(tensors, copies, frequencies, shape)


def read_shape(folder: Path) -> dict[str, Any]:
    """Read the sizes of a drafter from its config.json.

    Returns:
        fields of `CoralConfig`, without those of biases that the config does not mention.

    Raises:
        ValueError: if a field is missing or makes no sense, or the drafter is CORAL's or EAGLE-3's.
    """
    config = read_config(folder)
    if config.get("model_type") == CoralConfig.model_type:
        raise ValueError(
            f"{folder} is a CORAL drafter already; load it with AutoModel.from_pretrained."
        )
    if config.get("draft_vocab_size") is not None:
        _refuse_eagle3(folder, "`draft_vocab_size`")
    if "eagle3" in str(config.get("architectures")).lower():
        _refuse_eagle3(folder, "`architectures`")
    if config.get("model_type") == "eagle" and isinstance(config.get("model"), dict):
        config = config["model"]  # an older layout of vLLM
    # transformers writes null where it means the default
    fields = {name: value for name, value in config.items() if value is not None}
    missing = [name for name in SIZES if name not in fields]
    if missing:
        raise ValueError(
            f"{folder / CONFIG_NAME} lacks {', '.join(missing)}, which an EAGLE drafter's config"
            " has; add them, or give another checkpoint."
        )
    try:
        return _checked_shape(fields)
    except Exception as error:  # transformers raises any, wherever it meets a field
        raise ValueError(
            f"{folder / CONFIG_NAME} has a field that makes no sense ({type(error).__name__}:"
            f" {error}). Correct it, or download the file again."
        ) from error


def _checked_shape(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a drafter's sizes, after making its config and rotary frequencies from them."""
    shape = {name: fields[name] for name in SIZES}
    shape |= {name: fields.get(name, default) for name, default in DEFAULTS.items()}
    heads = shape["num_attention_heads"]
    shape["num_key_value_heads"] = fields.get("num_key_value_heads", heads)
    shape["head_dim"] = fields.get("head_dim", shape["hidden_size"] // heads)
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    kind, theta = rope.pop("type", "default"), float(fields.get("rope_theta", ROPE_THETA))
    shape["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **rope}
    biases = {"fc_bias": "bias", "attention_bias": "qkv_bias"}
    shape |= {name: fields[theirs] for name, theirs in biases.items() if theirs in fields}
    config = CoralConfig(**shape)
    ACT2FN[config.hidden_act]  # a KeyError that lists those there are
    if heads % shape["num_key_value_heads"]:
        raise ValueError(f"`num_key_value_heads` does not divide `num_attention_heads`, {heads}")
    if not LlamaRotaryEmbedding(config).inv_freq.isfinite().all():
        raise ValueError(f"the frequencies of `rope_parameters` {rope} are not finite")
    return shape


def _refuse_eagle3(folder: Path, found: str) -> NoReturn:
    raise ValueError(
        f"{folder} is an EAGLE-3 drafter ({found}): it reads three of the target's layers and has"
        " norms and an LM head of its own, for which a CORAL drafter has no place. Import an"
        " EAGLE-1, EAGLE-2 or HASS drafter, or serve this one with vLLM or SGLang."
    )


def check_tensors(
    found: dict[str, Tensor],
    wanted: dict[str, Tensor],
    what: str,
    remedy: str = "Start from another source, or from random weights.",
) -> None:
    """Raise a ValueError that names each tensor that does not fit.

    Args:
        found: tensors of a checkpoint or a layer.
        wanted: tensors of the names and shapes that there should be.
        what: the checkpoint or layer, as the message begins.
        remedy: how the message ends.
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
        raise ValueError(f"{what} has other tensors than expected; {'; '.join(listed)}. {remedy}")
