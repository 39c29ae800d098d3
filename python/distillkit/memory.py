"""Total and available memory, and the peak memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import resource
except ModuleNotFoundError:  # Windows
    _has_resource = False
else:
    _has_resource = True

if TYPE_CHECKING:
    import torch

__all__ = ["available_memory", "peak_memory", "total_memory"]

# The container's memory limit, if there is one.
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def peak_memory() -> dict[str, int]:
    """Return this process's peak memory in bytes: resident, and allocated on its CUDA device (0 if there is none)."""
    torch = sys.modules.get("torch")
    return {
        "peak_rss_bytes": _peak_resident(),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0,
    }


def _peak_resident() -> int:
    if not _has_resource:
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In KiB on Linux, in bytes on macOS.
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory(device: torch.device) -> int:
    """Return a device's total memory in bytes; for the CPU, what this machine or container may use."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return min(total, int(limit)) if limit.isdecimal() else total


def available_memory(device: torch.device) -> int:
    """Return a device's currently available memory in bytes."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        # Memory that torch has cached but not allocated is available too.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    import psutil

    # A container's limit may be lower than what the machine has available.
    resident = int(psutil.Process().memory_info().rss)
    return min(int(psutil.virtual_memory().available), max(total_memory(device) - resident, 0))
