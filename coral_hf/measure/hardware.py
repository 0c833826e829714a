"""What the machine calls itself.

In: a device. Out: a name for reports and cards.
"""

import platform
import re
from pathlib import Path

import torch


def hardware_name(device: torch.device) -> str:
    """Of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's own name on Linux, what Python knows of it elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if cpuinfo.exists()
        else None
    )
    return found[1] if found else platform.processor() or platform.machine()
