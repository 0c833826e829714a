"""The dtypes that drafters are read and written in.

In: a dtype as somebody named it, or tensors. Out: the dtype, or an error that names what came.
"""

from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype from its name or itself; a ValueError for any that holds no weights."""
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"`dtype` is {dtype}; use one of {', '.join(DTYPES)}.")
    return found


def check_dtypes(tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise a ValueError for a tensor that a cast would spoil: quantised, sparse, without data."""
    for name, tensor in tensors.items():
        is_dense = tensor.layout == torch.strided and not tensor.is_meta
        if is_dense and tensor.dtype in DTYPES.values():
            continue
        layout = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"`{name}` of {folder} is a {layout} tensor of {dtype}; expected a strided one of"
            f" {', '.join(DTYPES)}. Take the checkpoint from before it was quantised or packed."
        )
