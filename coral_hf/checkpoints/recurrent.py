"""Checkpoints of the Recurrent Drafter (Cheng et al. 2024), as its released code writes them.

In: a config and tensors. Out: a `RecurrentDrafter`; or the reverse. From that code
(apple/ml-recurrent-drafter bd8586b), not from a checkpoint, of which none is public.

    config.json    vocab_size, hidden_size, exit_dim, num_draft_layers, rnn     the same here
    tensors        rnn_w, rnn_u, input_proj, lm_head                            the same here
    rnn_w reads    rows of the target's table                                   what its layers see
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafters.recurrent import RecurrentConfig, RecurrentDrafter
from ..target import read_target
from .eagle import check_tensors, naming_config, table_scale
from .engines import Content
from .files import Checkpoint, check_dense

RELEASED = "recurrent_drafting_drafter"  # `model_type` of the released code
FIELDS = ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn")


def read_recurrent_shape(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read fields of `RecurrentConfig` from the config.json of a released drafter.

    Raises:
        ValueError: if a field is missing or makes no sense.
    """
    with naming_config(folder):
        # the released code leaves out what is its default
        fields = {name: ({"rnn": False} | config)[name] for name in FIELDS}
        RecurrentConfig(**fields)
    return fields


def recurrent_drafter(target: PreTrainedModel, found: Checkpoint) -> RecurrentDrafter:
    """Make a drafter from a released checkpoint.

    Raises:
        ValueError: that names each tensor which does not fit, or why the target does not.
    """
    folder, tensors = found.folder, found.tensors
    check_dense(tensors, folder)
    drafter = RecurrentDrafter.from_target(target, **found.fields).to(found.dtype)
    check_tensors(tensors, drafter.state_dict(), f"The checkpoint {folder}")
    scale = table_scale(read_target(target))
    if reasons := _obstacles(drafter.config, scale):
        raise ValueError(f"{folder} cannot be a drafter of this target: {', '.join(reasons)}.")
    drafter.load_state_dict(_scaled(tensors, 1 / scale))
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
    fields = {name: getattr(config, name) for name in FIELDS}
    fields |= {"model_type": RELEASED, "architectures": ["Drafter"]}
    notes = ["The released code reads Llama targets alone, and its samples are not exact."]
    return Content(fields, _scaled(drafter.state_dict(), scale), reasons, notes)


def _obstacles(config: RecurrentConfig, scale: float) -> list[str]:
    """List why rows of a table, which are `scale` times smaller, cannot be read in their place."""
    if scale == 1.0 or config.rnn:
        return []
    return [f"the target scales its embeddings by {scale:.6g}, and without an RNN no weight can"]


def _scaled(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Multiply `rnn_w.weight`, (hidden, hidden), which reads the embedding."""
    if scale == 1.0:
        return dict(tensors)
    return {**tensors, "rnn_w.weight": tensors["rnn_w.weight"] * scale}
