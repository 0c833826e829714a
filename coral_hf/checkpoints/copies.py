"""What a foreign checkpoint repeats of its target: embeddings, LM head, rotary frequencies.

In: copies and a target. Out: nothing, if they are the target's own up to rounding, else an error:
a drafter of another target drafts nothing useful.

    EAGLE, vLLM and SGLang give fc the rows of the embedding table; we give it what the target's
    first layer sees, which is `scale` times a row for Gemma or Granite. So fc differs by 1 / scale.
"""

import torch
from torch import Tensor
from transformers.utils import logging

from ..drafters.coral.modeling import CoralDrafter
from ..target import Target
from .eagle import EMBEDDINGS, EagleCheckpoint

logger = logging.get_logger(__name__)

ROUNDING = 1e-2  # of a number: a copy may be in half precision
ROWS = 4096  # that are compared at once


def check_copies(checkpoint: EagleCheckpoint, target: Target, drafter: CoralDrafter) -> None:
    """Compare what a checkpoint repeats with the target's own and with what its config says.

    Raises:
        ValueError: that names the tensor and how far it is off.
    """
    for name, found in checkpoint.copies.items():
        own = target.embeddings.weight if name == EMBEDDINGS else target.head.weight
        _check_copy(name, found, own)
    if not checkpoint.copies:
        logger.warning(
            f"The EAGLE checkpoint has no `{EMBEDDINGS}`, so only its sizes say that it belongs to"
            " this target. With another one few drafted tokens would be accepted."
        )
    for name, found in checkpoint.frequencies.items():
        _check_frequencies(name, found, drafter.rotary_emb.inv_freq)


def _check_copy(name: str, found: Tensor, own: Tensor) -> None:
    """Compare a copy (vocab, hidden) with the target's own."""
    if not isinstance(own, Tensor) or own.is_meta or not own.is_floating_point():
        logger.info(f"`{name}` is not compared: the target's own is quantised or offloaded.")
        return
    if found.shape != own.shape:
        reason = f"has shape {tuple(found.shape)}, the target's own {tuple(own.shape)}"
    else:
        num_off, gap = _differences(found, own.detach())
        if not num_off:
            return
        reason = f"differs from the target's own in {num_off} numbers, by up to {gap:.3g}"
    raise ValueError(
        f"`{name}` of the EAGLE checkpoint {reason}: it was made for another target. Use that one,"
        " or delete the tensor to take the rest all the same."
    )


def _differences(found: Tensor, own: Tensor) -> tuple[int, float]:
    """How many numbers of tables (vocab, hidden) no rounding makes equal, and the largest gap.

    Each is compared with its own size and the table's typical one, which a few large numbers do not
    move: of the sizes of the rows, the one in the middle.
    """
    parts = list(zip(found.split(ROWS), own.split(ROWS), strict=True))
    typical = torch.cat([part.float().abs().mean(-1) for _, part in parts]).median()
    num_off, largest = 0, 0.0
    for copy, part in parts:
        part = part.float()
        gap = (copy.to(part.device).float() - part).abs()  # (rows, hidden)
        is_off = ~(gap <= ROUNDING * (part.abs() + typical))  # so written, a NaN is off too
        if is_off.any():
            num_off += int(is_off.sum())
            largest = max(largest, float(gap[is_off].max()))
    return num_off, largest


def _check_frequencies(name: str, found: Tensor, own: Tensor) -> None:
    """Compare rotary frequencies (head_dim / 2,) with those that follow from the config."""
    if found.shape != own.shape or not torch.allclose(found.float(), own.cpu().float(), rtol=1e-2):
        raise ValueError(
            f"`{name}` of the EAGLE checkpoint is not what its config's `rope_theta` gives; set"
            " `rope_theta` in config.json to what the drafter was trained with."
        )


@torch.no_grad()
def table_scale(target: Target, num_rows: int = 64) -> float:
    """What the target's first layer sees of a token, as a multiple of its row of the table.

    Raises:
        ValueError: if it is no multiple.
    """
    table = target.embeddings.weight
    if not isinstance(table, Tensor) or table.is_meta or not table.is_floating_point():
        return target.embedding_scale
    ids = torch.arange(min(num_rows, len(table)), device=table.device)
    rows = table.detach()[ids].double()  # (rows, hidden)
    seen = target.embed(ids[None])[0].double()  # (rows, hidden)
    scale = float((seen * rows).sum() / rows.square().sum())
    if not torch.allclose(seen, scale * rows, rtol=ROUNDING, atol=1e-6):
        raise ValueError(
            f"The target's embedding {type(target.embeddings).__name__} is no multiple of its"
            " table, which is all that other engines' drafters read; train a drafter for this"
            " target with CoralTrainer, and serve it with transformers."
        )
    return 1.0 if abs(scale - 1.0) < 1e-3 else scale


def scale_embeddings(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Multiply what `fc` (hidden, 2 hidden) makes of the embedding, its first half."""
    if scale == 1.0:
        return tensors
    weight = tensors["fc.weight"].clone()
    half = weight.shape[1] // 2
    weight[:, :half] *= scale
    return {**tensors, "fc.weight": weight}
