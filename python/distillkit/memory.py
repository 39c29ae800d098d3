"""How much memory this process has taken at most."""

from __future__ import annotations

import resource
import sys

__all__ = ["peak_memory"]


def peak_memory() -> dict[str, int]:
    """Return this process's peak memory in bytes: resident, and allocated on its CUDA device (0 without one)."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch = sys.modules.get("torch")
    return {
        # Linux counts kibibytes, macOS bytes.
        "peak_rss_bytes": rss if sys.platform == "darwin" else rss * 1024,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0,
    }
