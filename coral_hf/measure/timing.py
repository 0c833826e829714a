"""Time and peak memory of one call.

In: a function of no arguments and the device it works on. Out: its result, the seconds until the
device was done, and on a GPU the highest memory that was allocated meanwhile.
"""

import resource
import sys
import time
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

Result = TypeVar("Result")


class Timed(NamedTuple, Generic[Result]):
    """A result and what it cost."""

    result: Result
    seconds: float
    peak_bytes: int | None  # None on a CPU, where only the process as a whole has a peak


def timed(call: Callable[[], Result], device: torch.device) -> Timed[Result]:
    """Run a call and wait for the device before the clock is read, at both ends."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if is_cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return Timed(result, seconds, torch.cuda.max_memory_allocated(device) if is_cuda else None)


def process_peak_bytes() -> int:
    """The most memory this process has ever held: weights, caches, Python and all."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB
