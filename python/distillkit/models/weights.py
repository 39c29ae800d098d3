"""Whether a model's folder is there and the files of its weights are whole, without loading them."""

from __future__ import annotations

import json
from pathlib import Path

from distillkit.configuration.places import missing_place

__all__ = ["damaged_file", "loading_errors", "loading_reason", "model_problem"]

# As the safetensors library: a longer header is refused.
_LONGEST_HEADER = 100_000_000
_INDEX = "model.safetensors.index.json"


def loading_errors() -> tuple[type[Exception], ...]:
    """Return what transformers raises for models that it cannot load: unknown, damaged, or with configs that its code
    does not expect."""
    import pickle

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    lookups = (AttributeError, KeyError, IndexError, AssertionError)
    damaged = (SafetensorError, StrictDataclassError, EOFError, pickle.UnpicklingError)
    return (OSError, ValueError, TypeError, ImportError, RuntimeError, *lookups, *damaged)


def loading_reason(error: Exception) -> str:
    """Return why transformers could not load a model, without its list of all architectures."""
    return str(error).partition("\nModel type should be one of")[0]


def model_problem(name: str) -> str | None:
    """Return why no model can be loaded from a path, or None; also None for what could be a hub id."""
    problem = missing_place(name)
    if problem is None and Path(name).expanduser().is_dir() and not (Path(name).expanduser() / "config.json").is_file():
        return f"the folder {name!r} contains no config.json, so it is not that of a model"
    return problem or damaged_file(name)


def damaged_file(folder: str) -> str | None:
    """Return what is wrong with a safetensors file in a model's folder, or None.

    Compares the length of each file with what its header describes: a file that was cut off, overwritten or not
    downloaded (a Git LFS pointer) is found, changed values are not.

    Args:
        folder: a model's folder; anything else, such as a hub id, has no such files.
    """
    try:
        path = Path(folder).expanduser()
        files = sorted(path.glob("*.safetensors"))
    except (OSError, ValueError, RuntimeError):
        return None
    listed, problem = _listed(path / _INDEX)
    if problem is not None:
        return problem
    missing = sorted(listed - {file.name for file in files})
    if missing:
        return f"{path / missing[0]} is missing: {_INDEX} lists it among {len(listed):,} files"
    for file in files:
        reason = _damage(file)
        if reason is not None:
            return f"{file}: not a whole safetensors file: {reason}; copy or download it again"
    return None


def _listed(index: Path) -> tuple[set[str], str | None]:
    """Return the files that an index lists, and what is wrong with it."""
    if not index.is_file():
        return set(), None
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set(), f"{index}: not an index of files of weights; copy or download it again"


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
