"""Private copy of a target's LM head in eight bits, for drafting alone.

In: the head's weight (vocab, hidden). Out: `QuantizedRows`, with one scale a row, and their
products with features, which are rounded row by row in the same way. A rounded logit changes what
is proposed and never what is verified. int8 on CPUs and older GPUs, fp8 on newer ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 16  # of both sizes of a weight, for the products on CUDA
LEAST_FEATURES = 17  # that the product of int8 takes on CUDA
DEVICES = ("cpu", "cuda")  # which have the products


class QuantizedRows(NamedTuple):
    """Rows in eight bits; rows and channels of zeros fill them up to multiples of `ALIGNMENT`."""

    values: Tensor  # (padded rows, padded hidden), int8 or float8_e4m3fn
    scales: Tensor  # (rows,), fp32: a row is its values × its scale


def dtype_for(device: torch.device) -> torch.dtype:
    """Return the eight-bit dtype that products on a device are fast in."""
    is_cuda = device.type == "cuda" and torch.version.cuda is not None
    has_fp8 = is_cuda and torch.cuda.get_device_capability(device) >= (8, 9)
    return torch.float8_e4m3fn if has_fp8 else torch.int8


@torch.no_grad()
def quantize(weight: Tensor, dtype: torch.dtype | None = None) -> QuantizedRows:
    """Round the rows of a weight (rows, hidden) to a dtype, by default that of its device."""
    dtype = dtype or dtype_for(weight.device)
    rows, hidden = weight.shape
    padding = (0, -hidden % ALIGNMENT)
    parts = [round_rows(F.pad(part, padding), dtype) for part in weight.split(8192)]
    values, scales = map(torch.cat, zip(*parts, strict=True))
    return QuantizedRows(_pad(values, (0, 0, 0, -rows % ALIGNMENT)), scales)


def round_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round rows (rows, hidden) symmetrically: values (rows, hidden), scales (rows,) in fp32."""
    rows = rows.float()
    largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    scales = (rows.abs().amax(-1) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = rows / scales[:, None]
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scales


def quantized_logits(features: Tensor, rows: QuantizedRows) -> Tensor:
    """Multiply features (*batch, hidden) with quantized rows: (*batch, rows), in fp32."""
    values, scales = round_rows(features.flatten(0, -2), rows.values.dtype)
    logits = multiply(values, scales, *rows)
    return logits.unflatten(0, features.shape[:-1])


def multiply(values: Tensor, scales: Tensor, row_values: Tensor, row_scales: Tensor) -> Tensor:
    """Multiply rounded features with rounded rows.

    Args:
        values, scales: of features, (features, hidden) and (features,).
        row_values, row_scales: of rows, (padded rows, padded hidden) and (rows,).

    Returns:
        (features, rows), in fp32.
    """
    count, hidden = values.shape
    is_integer = values.dtype == torch.int8
    least = LEAST_FEATURES if is_integer and values.is_cuda else 0
    padding = (0, row_values.shape[1] - hidden, 0, max(least - count, 0))
    if any(padding):
        values = _pad(values, padding)
    if is_integer:
        product = torch._int_mm(values, row_values.T)
    else:
        one = torch.ones((), dtype=torch.float32, device=values.device)
        product = torch._scaled_mm(
            values, row_values.T, scale_a=one, scale_b=one, out_dtype=torch.float32
        )
    return (product[:count, : len(row_scales)] * row_scales).mul_(scales[:, None])


def _pad(values: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Pad eight-bit values (rows, hidden) with zeros, as `F.pad` does those of other dtypes."""
    return F.pad(values.view(torch.int8), padding).view(values.dtype)
