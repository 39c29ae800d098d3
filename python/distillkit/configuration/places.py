"""Decides whether the name of a model or dataset is a path on this machine or a hub id, for every setting that takes
either."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

from distillkit.errors import nearest

__all__ = ["folder_name", "is_path", "missing_place", "neighbour", "new_folder"]

# As huggingface_hub.utils.validate_repo_id: one or two parts of letters, digits, - _ and .
_PART = r"[A-Za-z0-9_](?:[\w.\-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?:{_PART}/)?{_PART}", re.ASCII)
_LONGEST_ID = 96


def is_path(name: str) -> bool:
    """Whether a name can only be a path: it exists here, or cannot be a hub id.

    Example:
        >>> [is_path(name) for name in ("./student", "~/student", "runs/a/b", "Qwen/Qwen3-0.6B", "gpt2")]
        [True, True, True, False, False]
    """
    return _exists(name) or not _could_be_hub_id(name)


def new_folder(name: str) -> str:
    """Return the name if nothing in the working folder has it, otherwise with the first free number: captured-2."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if not _exists(free))


def folder_name(place: str) -> str:
    """Return a hub id unchanged, and of a folder only its name: headers are published with datasets.

    Links are not followed: what a user calls `teacher` is found again under that name.

    Example:
        >>> folder_name("Qwen/Qwen3-8B"), folder_name("/") == "/"
        ('Qwen/Qwen3-8B', True)
    """
    return (Path(os.path.abspath(place)).name or place) if _exists(place) else place


def _could_be_hub_id(name: str) -> bool:
    return (
        _HUB_ID.fullmatch(name) is not None
        and len(name) <= _LONGEST_ID
        and "--" not in name
        and ".." not in name
        and not name.endswith(".git")
    )


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, no such user
        return False


def missing_place(name: str, what: str = "folder", *, hub: bool = True) -> str | None:
    """Return why nothing can be loaded from a name that is a path, or None if it exists or could be a hub id.

    Args:
        name: a setting that takes a path or a hub id.
        what: `folder` for models and tokenizers, `file or folder` for datasets.
        hub: whether it may be a hub id; False: any name is a path.
    """
    if hub and not is_path(name):
        return None
    if not _exists(name):
        return f"no such {what}: {name!r}{neighbour(name)}"
    if what == "folder" and not Path(name).expanduser().is_dir():
        return f"{name!r} is a file; expected the folder of a model"
    return None


def neighbour(name: str) -> str:
    """Return a hint at what lies beside a missing path under a similar name, to append to a message; "" if nothing."""
    path = Path(name)
    try:
        siblings = [entry.name for entry in path.expanduser().parent.iterdir() if entry.name != path.name]
    except (OSError, ValueError, RuntimeError):
        return ""
    hint = nearest(path.name, siblings)
    return hint.replace("'", f"'{name[: len(name.rstrip('/')) - len(path.name)]}", 1) if hint else ""
