"""Named codec configurations."""

from __future__ import annotations

from typing import Any, Literal

from distillkit.codec.config import DistributionQuantizationConfig
from distillkit.errors import ConfigError, nearest

__all__ = ["PRESETS", "PresetName", "preset"]

PresetName = Literal["recommended", "budget", "faithful", "balanced", "compact"]

_PUBLISHED: dict[str, Any] = {
    "exact_dtype": "bfloat16",
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}

_HALVES: dict[str, Any] = {**_PUBLISHED, "exact_dtype": "float16", "term_dtype": "float16", "normalize_t": True}


def _bin(bits: int, ranks: int) -> dict[str, Any]:
    return {"scale_dtype": "float16", "element_bits": bits, "num_elements": ranks}


# Bytes per token are for vocabularies of 32,769 … 65,536, whose ids take 16 bits. KL (mean and 99th percentile over
# rows in nats, over the stored ids and the rest as one more outcome) was measured with this encoder on 21,973 real
# positions of a 135M model; do not compare it across different k. benches/presets.py searches for such configurations,
# also on your data.
PRESETS: dict[str, dict[str, Any]] = {
    # Published. 312 bytes, 56 of them values: KL 1.57e-4, 7.7e-4.
    "recommended": {**_PUBLISHED, "k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    # Published. 114 bytes, 14 of them values: KL 1.32e-2, 8.9e-2.
    "budget": {**_PUBLISHED, "k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
    # The rest are ours, in the published format: 16-bit floats where they suffice, and the bytes saved spent on
    # quantised residuals of the next ranks. Past the exact ranks, a value may be slightly above the one before it, and
    # up to 1% of the rows have probabilities that sum to more than 1 (on that sample, at most 1.02, 1.03 and 1.08).
    # Same size as `recommended`, for training on the full top 128. KL 2.28e-5, 1.23e-4.
    "faithful": {
        **_HALVES,
        "k": 128,
        "exact_k": 4,
        "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
        "residual_bins": [_bin(5, 32), _bin(3, 32)],
    },
    # 126 bytes, 26 of them values: 12 more than `budget`, and nearly exact. KL 1.33e-4, 8.8e-4.
    "balanced": {
        **_HALVES,
        "k": 50,
        "exact_k": 3,
        "polynomial_terms": [0, 1, "sqrt"],
        "residual_bins": [_bin(4, 24)],
    },
    # Same size as `budget`. KL 1.53e-3, 1.06e-2.
    "compact": {**_HALVES, "k": 50, "exact_k": 3, "polynomial_terms": [0, "sqrt"], "residual_bins": [_bin(4, 4)]},
}
"""Field values by preset name, except the vocabulary size `d`, which the caller supplies."""


def preset(name: str, *, vocab_size: int) -> DistributionQuantizationConfig:
    """Returns the named configuration for a vocabulary of `vocab_size` ids (the width of the teacher's logits).

    Raises:
        ConfigError: the preset is unknown, or does not fit the vocabulary.

    Example:
        >>> config = preset("recommended", vocab_size=151_936)
        >>> config.k, config.exact_k, config.polynomial_terms
        (128, 16, [0, 1, 2, 3, 4, 'sqrt'])
    """
    if name not in PRESETS:
        raise ConfigError(f"preset: must be {', '.join(PRESETS)}, found {name!r}{nearest(name, PRESETS)}")
    return DistributionQuantizationConfig(d=vocab_size, **PRESETS[name])
