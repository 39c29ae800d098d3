"""The machine that figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["cores", "machine"]


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Processor name and number of cores, for table headings."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {cores()} core{'s' if cores() > 1 else ''}"
