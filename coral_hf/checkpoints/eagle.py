"""Checkpoints of EAGLE-1, EAGLE-2 (Li et al. 2024) and HASS (Zhang et al. 2024).

In: a config and tensors. Out: a `CoralDrafter`, whose tensors have EAGLE's names; beside that the
checks that all checkpoints share.

    embedding (hidden) ┐
                       ├ fc (hidden, 2 hidden) ─ layers.0 without an input norm ─ next feature
    feature   (hidden) ┘

    EAGLE, vLLM and SGLang give fc the rows of the embedding table; we give it what the target's
    first layer sees, which is `scale` times a row for Gemma or Granite. So fc differs by 1 / scale.
"""

from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

from ..drafters.coral import CoralConfig, CoralDrafter
from ..target import Target, read_target, text_config
from .files import Checkpoint, check_dense

logger = logging.get_logger(__name__)

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
# where the config does not say whether there is a bias, these tensors do
BIASES = {"fc_bias": "fc.bias", "attention_bias": "layers.0.self_attn.q_proj.bias"}
# weights that read embeddings of the target, of CORAL and of Recurrent Drafters
READERS = ("fc.weight", "rnn_w.weight")
ROUNDING = 1e-2  # relative: a copy of the target's weights may be in half precision
CHUNK = 4096  # rows that are compared at a time


def read_eagle_shape(config: dict[str, Any]) -> dict[str, Any]:
    """Read the sizes of a drafter, after making its config and rotary frequencies from them.

    Returns:
        fields of `CoralConfig`, without those of biases that the config does not mention.
    """
    if config.get("model_type") == "eagle" and isinstance(config.get("model"), dict):
        config = config["model"]  # an older layout of vLLM
    # transformers writes null where it means the default
    fields = {name: value for name, value in config.items() if value is not None}
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
    own = CoralConfig(**shape)
    ACT2FN[own.hidden_act]  # a KeyError that lists those there are
    if heads % shape["num_key_value_heads"]:
        raise ValueError(f"`num_key_value_heads` does not divide `num_attention_heads`, {heads}")
    if not LlamaRotaryEmbedding(own).inv_freq.isfinite().all():
        raise ValueError(f"the frequencies of `rope_parameters` {rope} are not finite")
    return shape


def eagle_drafter(
    target: PreTrainedModel, found: Checkpoint, tensors: dict[str, Tensor]
) -> CoralDrafter:
    """Make a CORAL drafter of an EAGLE-1 checkpoint's sizes, and drop what is the target's own."""
    check_dense(tensors, found.folder)
    fields = found.fields | {
        field: name in tensors or found.fields.get(field, False) for field, name in BIASES.items()
    }
    own = {"vocab_size": text_config(target).vocab_size}
    drafter, bound = CoralDrafter.from_target(target, **fields | own), read_target(target)
    if EMBEDDINGS not in tensors and HEAD not in tensors:
        check_num_tokens(fields["vocab_size"], own["vocab_size"])
        logger.warning(
            f"The checkpoint has no `{EMBEDDINGS}`, so only its sizes say that it belongs to this"
            " target. With another one few drafted tokens would be accepted."
        )
    for name, weight in ((EMBEDDINGS, bound.embeddings.weight), (HEAD, bound.head.weight)):
        if name in tensors:
            check_copy(name, tensors.pop(name), weight, fields["vocab_size"])
    drop_frequencies(tensors, drafter.config)
    return drafter


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
    sizes = {name: [tuple(one[name].shape) for one in (found, wanted)] for name in both}
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "of another shape": [f"{n} {own}, not {to}" for n, (own, to) in sizes.items() if own != to],
        "not finite": [name for name in both if not found[name].isfinite().all()],
    }
    listed = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if listed:
        raise ValueError(f"{what} has other tensors than expected; {'; '.join(listed)}. {remedy}")


def check_num_tokens(vocab_size: int, own: int) -> None:
    """Raise a ValueError if a checkpoint without embeddings has another `vocab_size` than its
    target's `own`.
    """
    if vocab_size != own:
        raise ValueError(
            f"`vocab_size` of the target is {own}, but the checkpoint was made for one with"
            f" {vocab_size}, and has no `{EMBEDDINGS}` to compare. Use the checkpoint's own target."
        )


def check_copy(name: str, found: Tensor, own: Tensor, vocab_size: int) -> None:
    """Raise a ValueError if a copy (vocab, hidden) differs from the target's own, beyond rounding.

    Of a target with more or fewer than the copy's `vocab_size` rows, those count that both have.

    A number is compared with its own size and the table's typical one: the median over rows of the
    mean size, which a few large numbers do not move.
    """
    if not is_plain(own):
        logger.info(f"`{name}` is not compared: the target's own is quantised or offloaded.")
        return
    if len(found) == vocab_size:
        found = found[: len(own)]
    parts = own.detach()[:vocab_size].split(CHUNK)
    typical = float(torch.cat([part.float().abs().mean(-1) for part in parts]).median())
    near = {"rtol": ROUNDING, "atol": ROUNDING * typical}
    try:
        assert_close(found.split(CHUNK), parts, check_device=False, check_dtype=False, **near)
    except AssertionError as error:
        raise ValueError(
            f"`{name}` of the checkpoint was made for another target. Use that one, or delete"
            f" the tensor to import the rest all the same. {error}"
        ) from error


def drop_frequencies(tensors: dict[str, Tensor], config: PreTrainedConfig) -> None:
    """Take out of a checkpoint's tensors rotary frequencies, (head_dim / 2,) each.

    Raises:
        ValueError: if they are not what the drafter's config gives.
    """
    frequencies = LlamaRotaryEmbedding(config).inv_freq
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        found = tensors.pop(name).float()
        if found.shape != frequencies.shape or not found.allclose(frequencies, rtol=ROUNDING):
            raise ValueError(
                f"`{name}` is not what its config's `rope_theta` gives; set that in config.json to"
                " what the drafter was trained with."
            )


def is_plain(table: object) -> bool:
    """Whether a table (vocab, hidden) can be read as numbers."""
    return isinstance(table, Tensor) and table.is_floating_point() and not table.is_meta


@torch.no_grad()
def table_scale(target: Target, num_rows: int = 64) -> float:
    """Measure what the target's first layer sees of a token, as a multiple of its table's row.

    Raises:
        ValueError: if it is not a multiple.
    """
    table = target.embeddings.weight
    if not is_plain(table):
        return target.embedding_scale
    ids = torch.arange(min(num_rows, len(table)), device=table.device)
    rows = table.detach()[ids].double()  # (rows, hidden)
    seen = target.embed(ids[None])[0].double()  # (rows, hidden)
    scale = float((seen * rows).sum() / rows.square().sum())
    if not torch.allclose(seen, scale * rows, rtol=ROUNDING, atol=1e-6):
        raise ValueError(
            f"The target's embedding {type(target.embeddings).__name__} is not a multiple of its"
            " table, which is all that other engines' drafters read; serve it with transformers."
        )
    return 1.0 if abs(scale - 1.0) < 1e-3 else scale


def scale_embeddings(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Multiply what reads embeddings, (hidden, hidden): half of `fc.weight`, or `rnn_w.weight`."""
    scaled = {name: tensors[name].clone() for name in READERS if name in tensors and scale != 1.0}
    for weight in scaled.values():
        weight[:, : len(weight)] *= scale
    return tensors | scaled
