"""Checkpoints of Medusa heads (Cai et al. 2024) and Recurrent Drafters (Cheng et al. 2024).

In: a config and tensors, as they are published. Out: a drafter; or the reverse.

    Medusa         weights                           head k: block i, LM head behind n blocks
    Medusa, TGI    medusa_lm_head.pt, .safetensors   k.i.linear, k.n
    whole models   a language model's own            medusa_head.k.i.linear, medusa_head.k.n
    vLLM           model.safetensors                 blocks.k.layers.i, lm_heads.k

Medusa's last version has no LM heads of the heads' own, and neither has a file of it; vLLM calls
that `original_lm_head`. The number of heads is that of the tensors: a published config names fewer
than its file has. A Recurrent Drafter's fields and tensors have the same names here and there, but
its `rnn_w` reads rows of the target's table there, and here what the target's layers see.

This was read from the code of Medusa (e2a5d20), TGI, vLLM 0.32 and apple/ml-recurrent-drafter
(bd8586b), and from published names, shapes and configs, not from a checkpoint.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..drafters.medusa import MedusaConfig, MedusaDrafter
from ..drafters.recurrent import RecurrentConfig, RecurrentDrafter
from ..target import Target, check_target, read_target, text_config
from .eagle import HEAD, check_copy, check_tensors, scale_embeddings, table_scale
from .engines import Content
from .files import Checkpoint, check_dense

logger = logging.get_logger(__name__)

MEDUSA_WEIGHTS = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
# of a name as published, or as vLLM has it: head, block or LM head, and which tensor of it
PUBLISHED = re.compile(r"(?:medusa_heads?\.)?(\d+)\.(\d+)\.(linear\.)?(weight|bias)")
VLLM = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.linear\.weight")
RELEASED = "recurrent_drafting_drafter"  # `model_type` of the Recurrent Drafter's code
RECURRENT_FIELDS = ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn")


def names_medusa(config: dict[str, Any]) -> bool:
    """Whether a config.json says that it is of Medusa heads, or of a model with such heads."""
    kinds = str([config.get("model_type"), config.get("architectures")]).lower()
    return "medusa" in kinds or any(name.startswith("medusa_") for name in config)


def read_medusa_shape(config: dict[str, Any]) -> dict[str, Any]:
    """Read which model some heads were made for, and how many there are at least."""
    least, base = int(config.get("medusa_num_heads") or 1), config.get("base_model_name_or_path")
    MedusaConfig(num_heads=least, target_name_or_path=base)
    return {"num_heads": least, "target_name_or_path": base}


def our_name(name: str) -> str:
    """A tensor's name in a checkpoint → ours; one that is no head's stays."""
    if found := VLLM.fullmatch(name):
        return "blocks.{}.{}.linear.{}".format(*found.groups())
    if not (found := PUBLISHED.fullmatch(name)):
        return name
    head, block, linear, kind = found.groups()
    return f"blocks.{head}.{block}.linear.{kind}" if linear else f"lm_heads.{head}.{kind}"


def medusa_drafter(
    target: PreTrainedModel, found: Checkpoint, tensors: dict[str, Tensor]
) -> MedusaDrafter:
    """Make a drafter of a checkpoint's sizes, and leave its heads in `tensors`, by our names.

    Raises:
        ValueError: that names what is missing, or the model that the heads were made for.
    """
    folder, base, own_head = found.folder, found.fields["target_name_or_path"], "lm_heads.0.weight"
    copies = []  # of the target's LM head, (vocab, hidden)
    if any(name.startswith("medusa_head") for name in tensors):  # of a whole model
        copies += [tensors[HEAD]] if HEAD in tensors else []
        for name in [name for name in tensors if not name.startswith("medusa_head")]:
            del tensors[name]
    for name in list(tensors):
        tensors[our_name(name)] = tensors.pop(name)
    if found.config.get("original_lm_head") and own_head in tensors:
        copies.append(tensors.pop(own_head))  # vLLM reads a copy of it where heads have none
    check_dense(tensors, folder)
    places = [tuple(map(int, one.groups())) for one in map(BLOCK.fullmatch, tensors) if one]
    first = tensors.get("blocks.0.0.linear.weight")
    if first is None or first.ndim != 2:
        raise ValueError(
            f"{folder} has no Medusa heads: expected tensors such as 0.0.linear.weight, found"
            f" {', '.join(sorted(tensors)[:5])}. Give the folder of {' or '.join(MEDUSA_WEIGHTS)}."
        )
    heads, depth = (1 + max(place) for place in zip(*places, strict=True))
    if found.fields["num_heads"] > heads:
        raise ValueError(
            f"{folder} has {heads} Medusa heads, but its `medusa_num_heads` is"
            f" {found.fields['num_heads']}; download it again, or correct config.json."
        )
    own, sizes = tensors.get(own_head), {"vocab_size": text_config(target).vocab_size}
    if own is not None and own.ndim == 2:
        sizes["vocab_size"] = own.shape[0]
    sizes["hidden_size"] = first.shape[0]
    check_target(MedusaConfig(**sizes, target_name_or_path=base), target)
    if not copies and (not base or Path(base).name != Path(target.name_or_path).name):
        logger.warning(
            f"The Medusa heads were made for {base or 'an unnamed model'}, not by name for"
            f" {target.name_or_path or 'this target'}: only sizes say that they belong to it."
        )
    for copy in copies:
        check_copy(HEAD, copy, read_target(target).head.weight, sizes["vocab_size"])
    if not any(name.endswith(".bias") for name in tensors):  # as vLLM's may have none
        zero = torch.zeros(sizes["hidden_size"])
        tensors |= {f"blocks.{head}.{block}.linear.bias": zero for head, block in places}
    has_own = any(name.startswith("lm_heads.") for name in tensors)
    shape = {"num_heads": heads, "num_hidden_layers": depth, "has_lm_heads": has_own}
    return MedusaDrafter.from_target(target, **shape)


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
    return Content(fields, tensors, reasons, [])


def read_recurrent_shape(config: dict[str, Any]) -> dict[str, Any]:
    """Read fields of `RecurrentConfig` from the config.json of a released drafter."""
    # the released code leaves out what is its default
    fields = {name: ({"rnn": False} | config)[name] for name in RECURRENT_FIELDS}
    RecurrentConfig(**fields)
    return fields


def recurrent_drafter(
    target: PreTrainedModel, found: Checkpoint, tensors: dict[str, Tensor]
) -> RecurrentDrafter:
    """Make a drafter of a released checkpoint's sizes.

    Raises:
        ValueError: for a quantised tensor, or why the target does not fit.
    """
    check_dense(tensors, found.folder)
    drafter = RecurrentDrafter.from_target(target, **found.fields)
    if reasons := _obstacles(drafter.config, table_scale(read_target(target))):
        raise ValueError(f"{found.folder} cannot be a drafter of this target: {reasons[0]}.")
    return drafter


def recurrent_content(drafter: RecurrentDrafter, scale: float, vocab_size: int) -> Content:
    """Gather what a folder of the released code holds of a drafter.

    Args:
        scale: what the target's first layer sees, as a multiple of its table's row.
        vocab_size: of the target, which may have grown or shrunk since.
    """
    config, reasons = drafter.config, _obstacles(drafter.config, scale)
    if vocab_size != config.vocab_size:
        reasons += [f"its head has {config.vocab_size} tokens, the target {vocab_size}"]
    with torch.device("meta"):
        wanted = RecurrentDrafter(config).state_dict()
    check_tensors(drafter.state_dict(), wanted, "The drafter", "Merge an adapter first.")
    fields = {name: getattr(config, name) for name in RECURRENT_FIELDS}
    fields |= {"model_type": RELEASED, "architectures": ["Drafter"]}
    notes = ["The released code reads Llama targets alone, and its samples are not exact."]
    return Content(fields, scale_embeddings(drafter.state_dict(), scale), reasons, notes)


def _obstacles(config: RecurrentConfig, scale: float) -> list[str]:
    """List why rows of a table, which are `scale` times smaller, cannot be read in their place."""
    if scale == 1.0 or config.rnn:
        return []
    return [f"the target scales its embeddings by {scale:.6g}, and without an RNN no weight can"]
