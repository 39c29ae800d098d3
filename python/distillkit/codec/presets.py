"""Named codec configurations."""

from __future__ import annotations

import difflib
from typing import Any

from distillkit.codec.config import DistributionQuantizationConfig
from distillkit.errors import ConfigError

__all__ = ["PRESETS", "preset"]

_PUBLISHED: dict[str, Any] = {
    "exact_dtype": "bfloat16",
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    # 312 bytes a token at a vocabulary of 32,769 … 65,536.
    "recommended": {**_PUBLISHED, "k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    # 114 bytes a token there.
    "budget": {**_PUBLISHED, "k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
}
"""Field values by preset name; the vocabulary size `d` is the caller's."""


def preset(name: str, *, vocab_size: int) -> DistributionQuantizationConfig:
    """The named configuration for a vocabulary of `vocab_size` ids (the width of the teacher's logits).

    Raises:
        ConfigError: there is no such preset, or it does not fit the vocabulary.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"preset: there is no '{name}', there are {', '.join(PRESETS)}{hint}")
    return DistributionQuantizationConfig(d=vocab_size, **PRESETS[name])
