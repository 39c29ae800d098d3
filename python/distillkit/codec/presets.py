"""Named codec configurations."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from distillkit.codec.config import CodecConfig, CompactConfig, DistributionQuantizationConfig, SampledConfig
from distillkit.errors import ConfigError, nearest

__all__ = [
    "COMPACT_PRESETS",
    "FIXED_PRESETS",
    "FORMER_PRESETS",
    "PRESETS",
    "SAMPLED_PRESETS",
    "PresetName",
    "expected_bytes",
    "fixed_preset",
    "preset",
    "preset_of",
    "published_bytes",
]

logger = logging.getLogger(__name__)

PresetName = Literal[
    "recommended",
    "budget",
    "faithful",
    "balanced",
    "compact-128",
    "compact-50",
    "compact-adaptive",
    "sampled-50",
    "compact",
]

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
FIXED_PRESETS: dict[str, dict[str, Any]] = {
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
}
"""Those with a fixed number of bytes per row: field values by name, except the vocabulary size `d`, which the caller
supplies."""

# Bytes and KL are means over the rows above, with a prior learned from 225,000 rows of the same teacher over other
# documentation (123,000: 0.3% more bytes; 20,000: 7% more). On source code, 3% more, on prose 26% more, at the same KL.
COMPACT_PRESETS: dict[str, dict[str, Any]] = {
    # 127 bytes, 60 of them values: KL 2.0e-4.
    "compact-128": {"k": 128, "step": 0.00338},
    # 55 bytes, 25 of them values: KL 2.0e-4.
    "compact-50": {"k": 50, "step": 0.0054},
    # Few ids where the teacher is certain and many where it is not: more of its gradient per byte than any fixed k.
    # 82 bytes, 37 of them values, for 80 ids on average: KL 3.8e-4.
    "compact-adaptive": {"k": 256, "threshold": 5e-4, "step": 0.006},
}
"""Those of the compact format: field values by name, except `vocab_size` and `prior`."""

SAMPLED_PRESETS: dict[str, dict[str, Any]] = {
    # 17.5 bytes for 16 ids. The gradient is that of the whole distribution on average, with a variance of 1/50.
    "sampled-50": {"draws": 50},
}
"""Those of the format sampled: field values by name, except `vocab_size` and `prior`."""

PRESETS: dict[str, dict[str, Any]] = {**FIXED_PRESETS, **COMPACT_PRESETS, **SAMPLED_PRESETS}
"""Field values by preset name."""

FORMER_PRESETS: dict[str, dict[str, Any]] = {
    # 114 bytes. KL 1.53e-3, 1.06e-2.
    "compact": {**_HALVES, "k": 50, "exact_k": 3, "polynomial_terms": [0, "sqrt"], "residual_bins": [_bin(4, 4)]},
}
"""Presets of earlier releases, which are not offered any more: kept to resume captures and to name what they wrote."""


def preset(name: str, *, vocab_size: int) -> DistributionQuantizationConfig | CompactConfig | SampledConfig:
    """Returns the named configuration for a vocabulary of `vocab_size` ids (the width of the teacher's logits).

    Compact and sampled ones have the built-in prior; pass `Codec` a learned one. A former preset is logged as such.

    Raises:
        ConfigError: the preset is unknown, or does not fit the vocabulary.

    Example:
        >>> config = preset("recommended", vocab_size=151_936)
        >>> config.k, config.exact_k, config.polynomial_terms
        (128, 16, [0, 1, 2, 3, 4, 'sqrt'])
    """
    if name in FORMER_PRESETS:
        logger.warning(
            "preset %s is a layout of 114 bytes of earlier releases, kept for their datasets; for new ones, compact-50 "
            "takes half as many and is closer to the teacher",
            name,
        )
    elif name not in PRESETS:
        raise ConfigError(f"preset: must be {', '.join(PRESETS)}, found {name!r}{nearest(name, PRESETS)}")
    return _made(name, vocab_size)


def fixed_preset(name: str, *, vocab_size: int) -> DistributionQuantizationConfig:
    """Returns one of `FIXED_PRESETS`."""
    return DistributionQuantizationConfig(d=vocab_size, **FIXED_PRESETS[name])


def preset_of(config: CodecConfig) -> str | None:
    """The name of the preset, or former preset, that a configuration equals, whatever its prior; or None.

    Example:
        >>> preset_of(preset("budget", vocab_size=1000))
        'budget'
    """
    if isinstance(config, SampledConfig):
        drawn = config.without_prior()
        return next((name for name in SAMPLED_PRESETS if _made(name, drawn.vocab_size) == drawn), None)
    names, plain, size = {**FIXED_PRESETS, **FORMER_PRESETS}, config, getattr(config, "d", 0)
    if isinstance(config, CompactConfig):
        names, plain, size = COMPACT_PRESETS, config.without_prior(), config.vocab_size
    same_k = [name for name, fields in names.items() if _k(fields, size) == config.k]
    return next((name for name in same_k if _made(name, size) == plain), None)


def expected_bytes(config: CompactConfig | SampledConfig) -> float:
    """About how many bytes a row takes with a learned prior, for planning.

    Fitted to measurements of a 135M model over documentation (V = 49,152): k = 128 and 50 at a KL of 2e-4, k = 50 at
    4.5e-3, and with a threshold. Other kinds of text take up to a quarter more.

    Example:
        >>> round(expected_bytes(preset("compact-50", vocab_size=49_152)))
        54
    """
    if isinstance(config, SampledConfig):
        # Fitted to 12 and 50 draws of the same model.
        ids = min(float(config.k), _DISTINCT * math.pow(config.draws, _DISTINCT_GROWTH))
        return 1.4 + ids * (_DRAWN_BITS + math.log2(config.vocab_size / 49_152) / 2) / 8
    ids = float(config.k)
    if config.threshold is not None:
        ids = min(ids, _IDS_AT_A_THOUSANDTH * (1e-3 / max(config.threshold, 1e-12)) ** 0.72)
    id_bits = max(1.0, 4.43 - 0.32 * math.log2(ids / 50)) * math.log2(config.vocab_size) / 15.6
    # Above a threshold, there are no tails, whose values take the fewest bits.
    first = 4.15 if config.threshold is not None else 3.9
    value_bits = max(1.0, first - 0.9 * math.log2(config.step * math.sqrt(ids) / 0.037))
    return (3 if config.adaptive else 2.3) + ids * (id_bits + value_bits) / 8


def published_bytes(k: int, vocab_size: int) -> int:
    """Bytes per row of the published layout with k ids, and as many values as in the nearer published preset.

    Example:
        >>> published_bytes(128, 50_000), published_bytes(50, 50_000)
        (312, 114)
    """
    fields = FIXED_PRESETS["recommended" if k > 64 else "budget"]
    values = 2 * fields["exact_k"] + 4 * len(fields["polynomial_terms"])
    return int(values + -(-k * (vocab_size - 1).bit_length() // 8))


_DISTINCT, _DISTINCT_GROWTH, _DRAWN_BITS = 1.02, 0.703, 8.0
"""The mean number of distinct ids in n draws at temperature 1 is about a·n^b; and the bits of each with its count."""
_IDS_AT_A_THOUSANDTH = 48
"""Mean number of ids per row whose probability is at least 1e-3."""


def _made(name: str, vocab_size: int) -> DistributionQuantizationConfig | CompactConfig | SampledConfig:
    if name in SAMPLED_PRESETS:
        return SampledConfig(vocab_size=vocab_size, **SAMPLED_PRESETS[name])
    if name in COMPACT_PRESETS:
        fields = COMPACT_PRESETS[name]
        return CompactConfig(vocab_size=vocab_size, **{**fields, "k": _k(fields, vocab_size)})
    return DistributionQuantizationConfig(d=vocab_size, **{**FIXED_PRESETS, **FORMER_PRESETS}[name])


def _k(fields: Mapping[str, Any], vocab_size: int) -> int:
    """The ids per row of a preset. Where they are only the most, small vocabularies may have fewer."""
    return min(int(fields["k"]), vocab_size) if "threshold" in fields else int(fields["k"])
