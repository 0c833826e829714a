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
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..drafters.coral import CoralConfig, CoralDrafter
from ..target import Target, check_target, read_target, text_config
from .files import Checkpoint

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
SAMPLE = 4096  # rows of two tables that are compared
SAME_TABLE = 0.5  # mean cosine of rows from which on one table was trained from the other


def read_eagle_shape(config: dict[str, Any]) -> dict[str, Any]:
    """Read the sizes of a drafter, after making one without storage of them.

    Returns:
        fields of `CoralConfig`, without those of biases that the config does not mention.
    """
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
    with torch.device("meta"):
        CoralDrafter(CoralConfig(**shape))
    return shape


def eagle_drafter(
    target: PreTrainedModel, found: Checkpoint, tensors: dict[str, Tensor]
) -> CoralDrafter:
    """Make a CORAL drafter of an EAGLE-1 checkpoint's sizes, and drop what is the target's own."""
    fields, bound = dict(found.fields), read_target(target)
    fields |= {field: name in tensors or fields.get(field, False) for field, name in BIASES.items()}
    for name, own in ((EMBEDDINGS, bound.embeddings.weight), (HEAD, bound.head.weight)):
        if name in tensors:
            check_table(name, tensors.pop(name), own)
            fields["vocab_size"] = text_config(target).vocab_size
    drafter = CoralDrafter.from_target(target, **fields)
    check_target(drafter.config, target)
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


def check_table(name: str, found: Tensor, own: Tensor) -> None:
    """Raise a ValueError if a table (vocab, hidden) is not the target's own, or trained from it.

    Of a target that has gained or lost tokens since, the rows count that both have.
    """
    if not is_plain(own):
        return
    rows = min(len(found), len(own), SAMPLE)
    ours, theirs = own[:rows].detach().float().cpu(), found[:rows].float().cpu()
    if ours.shape != theirs.shape or F.cosine_similarity(ours, theirs).mean() < SAME_TABLE:
        raise ValueError(
            f"`{name}` of the checkpoint was made for another target: it has the shape"
            f" {(*found.shape,)}, and its rows are not near those of this one,"
            f" {(*own.shape,)}. Use the checkpoint's own target."
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
    rows, seen = table[ids].double(), target.embed(ids[None])[0].double()  # (rows, hidden) each
    scale = float((seen * rows).sum() / rows.square().sum())
    if not torch.allclose(seen, scale * rows, rtol=1e-2, atol=1e-6):
        raise ValueError(
            f"The target's embedding {type(target.embeddings).__name__} is not a multiple of its"
            " table, which is all that other engines' drafters read; serve it with transformers."
        )
    return 1.0 if abs(scale - 1.0) < 1e-3 else scale


def scale_embeddings(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Multiply what reads embeddings, (hidden, hidden): the first half of `fc.weight`."""
    embedding, feature = tensors["fc.weight"].chunk(2, dim=1)
    return tensors | {"fc.weight": torch.cat([embedding * scale, feature], dim=1)}
