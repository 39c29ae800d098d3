"""Whether the files of a model's weights are whole, without loading them."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["damaged_file"]

# As the safetensors library: a longer header is refused.
_LONGEST_HEADER = 100_000_000


def damaged_file(folder: str) -> str | None:
    """Return what is wrong with a safetensors file in a model's folder, or None.

    Compares the length of each file with what its header describes: a file that was cut off, overwritten or not
    downloaded (a Git LFS pointer) is found, changed values are not.

    Args:
        folder: a model's folder; anything else, such as a hub id, has no such files.
    """
    try:
        files = sorted(Path(folder).expanduser().glob("*.safetensors"))
    except (OSError, ValueError, RuntimeError):
        return None
    for file in files:
        reason = _damage(file)
        if reason is not None:
            return f"{file}: not a whole safetensors file: {reason}; copy or download it again"
    return None


def _damage(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            return f"its header of {length:,} bytes does not fit in {size:,} bytes"
        header = file.read(length)
    try:
        content = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in content.items() if name != "__metadata__"]
        end = max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return "its header is not the JSON of one"
    if 8 + length + end != size:
        return f"{size:,} bytes, its header describes {8 + length + end:,}"
    return None
