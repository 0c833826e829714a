"""Checkpoints of Medusa heads (Cai et al. 2024), as they are published, and as they are written.

In: a config and tensors. Out: a `MedusaDrafter`; or the reverse.

                   weights                           head k: block i, LM head behind n blocks
    Medusa, TGI    medusa_lm_head.pt, .safetensors   k.i.linear, k.n
    whole models   a language model's own            medusa_head.k.i.linear, medusa_head.k.n
    vLLM           model.safetensors                 blocks.k.layers.i, lm_heads.k

Medusa's last version has no LM heads of the heads' own, and neither has a file of it; vLLM calls
that `original_lm_head`. The number of heads is that of the tensors: a published config names fewer
than its file has. This was read from the code of Medusa (e2a5d20), TGI and vLLM 0.32, and from
published names, shapes and configs, not from a checkpoint.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..drafters.medusa import MedusaConfig, MedusaDrafter
from ..target import Target, check_target, read_target, text_config
from .eagle import HEAD, check_copy, check_tensors, naming_config
from .engines import Content
from .files import Checkpoint, check_dense

logger = logging.get_logger(__name__)

MEDUSA_ENGINES = ("vllm", "medusa")
MEDUSA_WEIGHTS = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
# of a name as published, or as vLLM has it: head, block or LM head, and which tensor of it
PUBLISHED = re.compile(r"(?:medusa_heads?\.)?(\d+)\.(\d+)\.(linear\.)?(weight|bias)")
VLLM = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.linear\.weight")


def names_medusa(config: dict[str, Any]) -> bool:
    """Whether a config.json says that it is of Medusa heads, or of a model with such heads."""
    kinds = str([config.get("model_type"), config.get("architectures")]).lower()
    return "medusa" in kinds or any(name.startswith("medusa_") for name in config)


def our_name(name: str) -> str:
    """A tensor's name in a checkpoint → ours; one that is no head's stays."""
    if found := VLLM.fullmatch(name):
        return "blocks.{}.{}.linear.{}".format(*found.groups())
    if not (found := PUBLISHED.fullmatch(name)):
        return name
    head, block, linear, kind = found.groups()
    return f"blocks.{head}.{block}.linear.{kind}" if linear else f"lm_heads.{head}.{kind}"


def medusa_drafter(target: PreTrainedModel, found: Checkpoint) -> MedusaDrafter:
    """Make a drafter from a checkpoint.

    Raises:
        ValueError: that names each tensor which is missing, unknown or of another shape, or the
            model that the heads were made for.
    """
    folder, config = found.folder, found.config
    tensors, copies = _apart(found.tensors, config)
    check_dense(tensors, folder)
    tensors = {our_name(name): tensor for name, tensor in tensors.items()}
    places = [tuple(map(int, one.groups())) for one in map(BLOCK.fullmatch, tensors) if one]
    first = tensors.get("blocks.0.0.linear.weight")
    if first is None or first.ndim != 2:
        raise ValueError(
            f"{folder} has no Medusa heads: expected tensors such as 0.0.linear.weight, found"
            f" {', '.join(sorted(tensors)[:5])}. Give the folder of {' or '.join(MEDUSA_WEIGHTS)}."
        )
    heads, depth = (1 + max(place) for place in zip(*places, strict=True))
    with naming_config(folder):
        said, base = int(config.get("medusa_num_heads") or 0), config.get("base_model_name_or_path")
        MedusaConfig(target_name_or_path=base)
    if said > heads:
        raise ValueError(
            f"{folder} has {heads} Medusa heads, but its `medusa_num_heads` is {said}; download it"
            " again, or correct config.json."
        )
    head, own = read_target(target).head, tensors.get("lm_heads.0.weight")
    sizes = {"hidden_size": first.shape[0], "vocab_size": text_config(target).vocab_size}
    if own is not None and own.ndim == 2:
        sizes["vocab_size"] = own.shape[0]
    check_target(MedusaConfig(**sizes, target_name_or_path=base), target)
    if not copies and (not base or Path(base).name != Path(target.name_or_path).name):
        logger.warning(
            f"The Medusa heads were made for {base or 'a model that is not named'}, and the target"
            f" is {target.name_or_path or 'unnamed'}: only its sizes say that they belong to it."
            " With another one few drafted tokens would be accepted."
        )
    for copy in copies:
        check_copy(HEAD, copy, head.weight, sizes["vocab_size"])
    has_own = any(name.startswith("lm_heads.") for name in tensors)
    if not any(name.endswith(".bias") for name in tensors):  # as vLLM's may have none
        zero = torch.zeros(sizes["hidden_size"])
        tensors |= {f"blocks.{head}.{block}.linear.bias": zero for head, block in places}
    shape = {"num_heads": heads, "num_hidden_layers": depth, "has_lm_heads": has_own}
    drafter = MedusaDrafter.from_target(target, **shape).to(found.dtype)
    check_tensors(tensors, drafter.state_dict(), f"The Medusa checkpoint {folder}")
    drafter.load_state_dict(tensors)
    return drafter


def _apart(
    tensors: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Take out of a checkpoint its heads, and copies of the target's LM head (vocab, hidden)."""
    copies = []
    if own := {name: one for name, one in tensors.items() if name.startswith("medusa_head")}:
        copies += [tensors[HEAD]] if HEAD in tensors else []  # of a whole model
        tensors = own
    if config.get("original_lm_head"):  # vLLM reads a copy of it where heads have none
        named = {our_name(name): name for name in tensors}
        if name := named.get("lm_heads.0.weight"):
            copies.append(tensors[name])
            tensors = {other: one for other, one in tensors.items() if other != name}
    return tensors, copies


def medusa_content(
    drafter: MedusaDrafter, engine: str, target: Target | None, vocab_size: int
) -> Content:
    """Gather what an engine's folder holds of a drafter, under the published names.

    Args:
        target: the drafter's own, if it is at hand.
        vocab_size: of the target, which may have grown or shrunk since.
    """
    config, tensors, reasons = drafter.config, dict[str, Tensor](), list[str]()
    depth, has_own = config.num_hidden_layers, config.has_lm_heads
    for name, tensor in drafter.state_dict().items():
        kind, head, *rest = name.split(".")
        tensors[".".join([head, *(rest if kind == "blocks" else [str(depth), *rest])])] = tensor
    if has_own and vocab_size != config.vocab_size:
        reasons.append(f"its heads have {config.vocab_size} tokens, and the target {vocab_size}")
    if not has_own and engine == "vllm":
        if target is None:
            reasons.append("vLLM reads a copy of the target's LM head; pass `target` (--target)")
        elif target.head.bias is not None:
            reasons.append("the target's LM head has a bias, which vLLM's heads drop")
        else:
            tensors[f"0.{depth}.weight"] = target.head.weight
    notes = []
    if config.tree_choices is not None:
        notes.append("Its static tree stays behind: vLLM drafts chains, Medusa's code has its own.")
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
    return Content(fields, tensors, reasons, notes)
