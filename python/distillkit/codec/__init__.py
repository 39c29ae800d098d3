"""The codec: sparse teacher distributions ↔ bytes, in the published formats and our own (rust/codec/FORMAT.md)."""

from __future__ import annotations

from distillkit.codec.codec import Codec
from distillkit.codec.config import (
    CodecConfig,
    CompactConfig,
    DistributionQuantizationConfig,
    LearnedConfig,
    LegacyLogitCompressionConfig,
    ResidualBin,
    SampledConfig,
    codec_config,
)
from distillkit.codec.draws import draws_from_logits, uniforms
from distillkit.codec.presets import PRESETS, preset
from distillkit.codec.prior import Prior
from distillkit.codec.topk import sparse_from_logits

__all__ = [
    "PRESETS",
    "Codec",
    "CodecConfig",
    "CompactConfig",
    "DistributionQuantizationConfig",
    "LearnedConfig",
    "LegacyLogitCompressionConfig",
    "Prior",
    "ResidualBin",
    "SampledConfig",
    "codec_config",
    "draws_from_logits",
    "preset",
    "sparse_from_logits",
    "uniforms",
]
