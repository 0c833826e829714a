"""What a checkpoint of EAGLE's shape repeats of its target, compared with the target's own.

In: copies of embeddings, LM head and rotary frequencies, and a target. Out: nothing if they agree
up to rounding, else an error: a drafter of another target drafts nothing useful.

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

ROUNDING = 1e-2  # relative: a copy may be in half precision
CHUNK = 4096  # rows that are compared at a time
# families of which transformers scales embeddings inside of the embedding module
SCALED_TABLES = ("gemma", "vaultgemma", "minicpm3", "biogpt", "xglm")


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
    own = drafter.rotary_emb.inv_freq.cpu().float()  # of shape (head_dim / 2,)
    for name, found in checkpoint.frequencies.items():
        if found.shape != own.shape or not torch.allclose(found.float(), own, rtol=ROUNDING):
            raise ValueError(
                f"`{name}` of the EAGLE checkpoint is not what its config's `rope_theta` gives; set"
                " `rope_theta` in config.json to what the drafter was trained with."
            )


def _check_copy(name: str, found: Tensor, own: Tensor) -> None:
    """Raise a ValueError if a copy (vocab, hidden) differs from the target's own."""
    if not _is_plain(own):
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
        " or delete the tensor to import the rest all the same."
    )


def _is_plain(table: object) -> bool:
    """Whether a table (vocab, hidden) can be read as numbers."""
    return isinstance(table, Tensor) and table.is_floating_point() and not table.is_meta


def _differences(found: Tensor, own: Tensor) -> tuple[int, float]:
    """Count the numbers of tables (vocab, hidden) that differ by more than rounding; largest gap.

    A number is compared with its own size and the table's typical one: the median over rows of the
    mean size, which a few large numbers do not move.
    """
    chunks = list(zip(found.split(CHUNK), own.split(CHUNK), strict=True))
    typical = torch.cat([chunk.float().abs().mean(-1) for _, chunk in chunks]).median()
    num_off, largest = 0, 0.0
    for copy, chunk in chunks:
        chunk = chunk.float()
        gap = (copy.to(chunk.device).float() - chunk).abs()  # (rows, hidden)
        is_off = ~(gap <= ROUNDING * (chunk.abs() + typical))  # true for NaN too
        if is_off.any():
            num_off += int(is_off.sum())
            largest = max(largest, float(gap[is_off].max()))
    return num_off, largest


@torch.no_grad()
def table_scale(target: Target, num_rows: int = 64) -> float:
    """Measure what the target's first layer sees of a token, as a multiple of its table's row.

    Raises:
        ValueError: if it is not a multiple.
    """
    table = target.embeddings.weight
    if not _is_plain(table):
        return target.embedding_scale
    ids = torch.arange(min(num_rows, len(table)), device=table.device)
    rows = table.detach()[ids].double()  # (rows, hidden)
    seen = target.embed(ids[None])[0].double()  # (rows, hidden)
    scale = float((seen * rows).sum() / rows.square().sum())
    if not torch.allclose(seen, scale * rows, rtol=ROUNDING, atol=1e-6):
        raise ValueError(
            f"The target's embedding {type(target.embeddings).__name__} is not a multiple of its"
            " table, which is all that other engines' drafters read; train a drafter for this"
            " target with CoralTrainer, and serve it with transformers."
        )
    return 1.0 if abs(scale - 1.0) < 1e-3 else scale


def scale_embeddings(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Multiply the first half of `fc.weight` (hidden, 2 hidden), which reads the embedding."""
    if scale == 1.0:
        return tensors
    weight = tensors["fc.weight"].clone()
    half = weight.shape[1] // 2
    weight[:, :half] *= scale
    return {**tensors, "fc.weight": weight}
