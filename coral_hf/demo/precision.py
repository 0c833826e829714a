"""Whether training in bf16 pays on a device, found by trying: some CPUs only emulate it.

In: a device. Out: yes or no.
"""

import time

import torch

ROWS, WIDTH = 512, 512
REPEATS = 20


def bf16_pays(device: torch.device) -> bool:
    """Whether a matrix product in bf16 is clearly faster than in fp32."""
    if device.type not in ("cpu", "cuda"):
        return False
    return matmul_seconds(torch.bfloat16, device) < 0.7 * matmul_seconds(torch.float32, device)


def matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The fastest of a few products of two square matrices: others may be using the machine."""
    a, b = torch.ones(2, ROWS, WIDTH, dtype=dtype, device=device)
    return min(one_matmul_seconds(a, b) for _ in range(REPEATS))


def one_matmul_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    # reading a number waits for the device
    (a @ b)[0, 0].item()
    return time.perf_counter() - start
