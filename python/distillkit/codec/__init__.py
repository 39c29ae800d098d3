"""The codec: sparse teacher distributions ↔ bytes, in the published formats (rust/codec/FORMAT.md)."""

from __future__ import annotations

from distillkit.codec.codec import Codec
from distillkit.codec.config import (
    CodecConfig,
    DistributionQuantizationConfig,
    LegacyLogitCompressionConfig,
    ResidualBin,
    codec_config,
)
from distillkit.codec.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "Codec",
    "CodecConfig",
    "DistributionQuantizationConfig",
    "LegacyLogitCompressionConfig",
    "ResidualBin",
    "codec_config",
    "preset",
]
