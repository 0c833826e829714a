"""Checkpoints of Medusa heads (Cai et al. 2024).

In: a config and tensors, as they are published. Out: a drafter; or the reverse.

    Medusa         weights                           head k: block i, LM head behind n blocks
    Medusa, TGI    medusa_lm_head.pt, .safetensors   k.i.linear, k.n
    whole models   a language model's own            medusa_head.k.i.linear, medusa_head.k.n
    vLLM           model.safetensors                 blocks.k.layers.i, lm_heads.k

Medusa's last version has no LM heads of the heads' own, and neither has a file of it; vLLM calls
that `original_lm_head`. The numbers of heads and blocks are those of the tensors: a published
config names fewer heads than its file has.

This was read from the code of Medusa (e2a5d20), TGI and vLLM 0.32, and from published names, shapes
and configs, not from a checkpoint.
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafters.medusa import MedusaConfig, MedusaDrafter
from ..target import Target, check_target, text_config
from .eagle import HEAD
from .engines import Content
from .files import Checkpoint, renamed

WEIGHTS = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
# patterns of names as published, or as vLLM has them → ours
NAMES = {
    r"^(?:medusa_heads?\.)?(\d+)\.(\d+)\.linear\.": r"blocks.\1.\2.linear.",
    r"^(?:medusa_heads?\.)?(\d+)\.\d+\.(weight|bias)$": r"lm_heads.\1.\2",
    r"^blocks\.(\d+)\.layers\.(\d+)\.": r"blocks.\1.\2.linear.",
}
BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.linear\.weight")


def names_medusa(config: dict[str, Any]) -> bool:
    """Whether a config.json says that it is of Medusa heads, or of a model with such heads."""
    kinds = str([config.get("model_type"), config.get("architectures")]).lower()
    return "medusa" in kinds or any(name.startswith("medusa_") for name in config)


def read_medusa_shape(config: dict[str, Any]) -> dict[str, Any]:
    """Read which model some heads were made for; all else follows from tensors."""
    fields = {"target_name_or_path": config.get("base_model_name_or_path")}
    MedusaConfig(**fields)
    return fields


def medusa_drafter(
    target: PreTrainedModel, found: Checkpoint, tensors: dict[str, Tensor]
) -> MedusaDrafter:
    """Make a drafter of a checkpoint's sizes, and leave its heads alone in `tensors`.

    Raises:
        ValueError: that names what is missing, or the model that the heads were made for.
    """
    own_head = "lm_heads.0.weight"
    # of a whole model; and a copy of the target's LM head, which vLLM reads where heads have none
    others = [name for name in tensors if name.startswith("model.") or name == HEAD]
    for name in [*others, *([own_head] if found.config.get("original_lm_head") else [])]:
        tensors.pop(name, None)
    places = [tuple(map(int, one.groups())) for one in map(BLOCK.fullmatch, tensors) if one]
    if not places:
        raise ValueError(
            f"{found.folder} has no Medusa heads: expected tensors such as 0.0.linear.weight, found"
            f" {', '.join(sorted(tensors)[:5])}. Give the folder of {' or '.join(WEIGHTS)}."
        )
    heads, depth = (1 + max(place) for place in zip(*places, strict=True))
    width = len(tensors["blocks.0.0.linear.weight"])
    sizes = {"hidden_size": width, "vocab_size": text_config(target).vocab_size}
    if own_head in tensors:
        sizes["vocab_size"] = len(tensors[own_head])
    check_target(MedusaConfig(**sizes, **found.fields), target)
    if not any(name.endswith(".bias") for name in tensors):  # as vLLM's may have none
        zero = torch.zeros(width)
        tensors |= {f"blocks.{head}.{block}.linear.bias": zero for head, block in places}
    shape = {"num_heads": heads, "num_hidden_layers": depth, "has_lm_heads": own_head in tensors}
    return MedusaDrafter.from_target(target, **shape)


def medusa_content(drafter: MedusaDrafter, engine: str, target: Target, vocab_size: int) -> Content:
    """Gather what vLLM's folder holds of a drafter, under the published names.

    `vocab_size` is the target's, which may have grown or shrunk since.
    """
    config, reasons = drafter.config, list[str]()
    depth, has_own = config.num_hidden_layers, config.has_lm_heads
    names = {r"^blocks\.": "", r"^lm_heads\.(\d+)": rf"\1.{depth}"}
    tensors = renamed(drafter.state_dict(), names)
    if engine != "vllm":
        reasons.append(f"{engine} drafts with no Medusa heads; use 'vllm'")
    if has_own and vocab_size != config.vocab_size:
        reasons.append(f"its heads have {config.vocab_size} tokens, and the target {vocab_size}")
    if not has_own:
        tensors[f"0.{depth}.weight"] = target.head.weight
        if target.head.bias is not None:
            reasons.append("the target's LM head has a bias, which vLLM's heads drop")
    fields = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "base_model_name_or_path": config.target_name_or_path,
        "medusa_num_heads": config.num_heads,
        "medusa_num_layers": depth,
        "hidden_size": config.hidden_size,
        "vocab_size": vocab_size,
        "medusa_fc_bias": True,
        "original_lm_head": not has_own,
    }
    return Content(fields, tensors, reasons)
