"""What the cards of datasets and models on the hub share: their YAML header, and names that may be published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from distillkit.configuration.places import is_path
from distillkit.configuration.urls import is_url

__all__ = ["CARD", "front_matter", "hub_id", "public_name"]

CARD = "README.md"
"""The name of a card's file."""

_DATASETS = "hf://datasets/"


def front_matter(fields: Mapping[str, Any]) -> str:
    """Return a card's YAML header, without the fields that are None or empty.

    Example:
        >>> print(front_matter({"license": "mit", "tags": ["distillkit"], "base_model": None}))
        ---
        license: mit
        tags:
        - distillkit
        ---
    """
    known = {name: value for name, value in fields.items() if value not in (None, "", [], {})}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---"


def hub_id(name: object) -> str | None:
    """Return the hub id that a recorded name certainly is, or None: `OWNER/NAME` that is no folder here, or a hub URL.

    Example:
        >>> [hub_id(name) for name in ("Qwen/Qwen3-8B", "hf://datasets/me/captured@main", "./student", "gpt2")]
        ['Qwen/Qwen3-8B', 'me/captured', None, None]
    """
    text = str(name)
    if text.startswith(_DATASETS):
        text = text.removeprefix(_DATASETS).split("@")[0]
    return text if text.count("/") == 1 and not is_url(text) and not is_path(text) else None


def public_name(name: object) -> str:
    """Return what a card calls a model or dataset: its hub id, or the last part of a path, whose others are private.

    Example:
        >>> [public_name(name) for name in ("Qwen/Qwen3-8B", "/home/me/models/teacher/", "gpt2")]
        ['Qwen/Qwen3-8B', 'teacher', 'gpt2']
    """
    return hub_id(name) or PurePath(str(name).replace("\\", "/")).name or str(name)
