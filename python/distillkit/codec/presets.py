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


# Bytes a token are those at a vocabulary of 32,769 … 65,536, where ids take 16 bits. KL (mean and 99th percentile of
# the rows in nats, renormalised over the stored ids) is this encoder's on 21,973 real positions of a 135M model; do not
# compare it between different k. benches/presets.py searches for such configurations, on your own sample too.
PRESETS: dict[str, dict[str, Any]] = {
    # The published ones. 312 bytes, 56 of them values: KL 1.69e-4, 8.4e-4.
    "recommended": {**_PUBLISHED, "k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    # 114 bytes, 14 of them values: KL 1.47e-2, 9.6e-2.
    "budget": {**_PUBLISHED, "k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
    # Ours, in the published format: floats of 16 bits where they suffice, and quantised residuals of the next ranks for
    # the bytes that this saves. Past the exact ranks, values may rise a little from one to the next,
    # and up to 1% of the rows add up to more than 1 (at most 1.02, 1.03 and 1.08 there).
    # As large as `recommended`, for training on the whole top 128. KL 1.46e-5, 6.4e-5.
    "faithful": {
        **_HALVES,
        "k": 128,
        "exact_k": 4,
        "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
        "residual_bins": [_bin(5, 32), _bin(3, 32)],
    },
    # 126 bytes, 26 of them values: 12 more than `budget` and near exact. KL 8.8e-5, 4.3e-4.
    "balanced": {
        **_HALVES,
        "k": 50,
        "exact_k": 3,
        "polynomial_terms": [0, 1, "sqrt"],
        "residual_bins": [_bin(4, 24)],
    },
    # As large as `budget`. KL 1.64e-3, 1.09e-2.
    "compact": {**_HALVES, "k": 50, "exact_k": 3, "polynomial_terms": [0, "sqrt"], "residual_bins": [_bin(4, 4)]},
}
"""Field values by preset name; the vocabulary size `d` is the caller's."""


def preset(name: str, *, vocab_size: int) -> DistributionQuantizationConfig:
    """The named configuration for a vocabulary of `vocab_size` ids (the width of the teacher's logits).

    Raises:
        ConfigError: there is no such preset, or it does not fit the vocabulary.

    Example:
        >>> config = preset("recommended", vocab_size=151_936)
        >>> config.k, config.exact_k, config.polynomial_terms
        (128, 16, [0, 1, 2, 3, 4, 'sqrt'])
    """
    if name not in PRESETS:
        raise ConfigError(f"preset: must be {', '.join(PRESETS)}, found {name!r}{nearest(name, PRESETS)}")
    return DistributionQuantizationConfig(d=vocab_size, **PRESETS[name])
