"""Codec configurations, with the field names of the published YAMLs.

What is valid, and what size a row has, is computed by the native code; the classes here name and document the fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Union

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from distillkit import _native
from distillkit.errors import ConfigError

__all__ = [
    "CodecConfig",
    "DistributionQuantizationConfig",
    "LegacyLogitCompressionConfig",
    "ResidualBin",
    "codec_config",
]

FloatName = Literal["float16", "bfloat16", "float32", "float64"]


def _describe(error: ValidationError) -> str:
    """One line a problem, each with its dotted path."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"] if not isinstance(part, str) or "[" not in part)
        message = problem["msg"].removeprefix("Value error, ")
        found = "" if problem["type"] in ("missing", "value_error") else f" (found {problem['input']!r})"
        lines.append(f"{path}: {message}{found}" if path else message)
    return "; ".join(lines)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ResidualBin(_Model):
    """Quantised residuals of the next `num_elements` ranks: one scale, then codes of `element_bits` bits."""

    scale_dtype: FloatName
    element_bits: int
    num_elements: int


class _CodecModel(_Model):
    format: ClassVar[str]

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(f"{type(self).__name__}: {_describe(error)}") from None

    @model_validator(mode="after")
    def _check(self) -> _CodecModel:
        _native.Codec(self.format, self.model_dump_json())
        return self


class DistributionQuantizationConfig(_CodecModel):
    """The published "distribution quantization" (`logprob_compressor` in a YAML).

    Attributes:
        d: vocabulary size; ids are 0 … d − 1 and take ⌈log₂ d⌉ bits.
        k: stored ids a row.
        exact_k: how many of the most probable are stored as values of `exact_dtype`.
        exact_dtype: float16, bfloat16, float32 or float64.
        polynomial_terms: terms of the polynomial over the other ranks: integer powers, "sqrt", "exp".
        term_dtype: type of the coefficients.
        residual_bins: quantised residuals of the ranks after the exact ones, in order; may be empty.
        delta_encoding: store the first value and then differences. On unless switched off, as published.
        error_diffusion: carry quantisation errors into the next element (encoder only).
        normalize_t: evaluate the terms on [0, 1] instead of 0 … k − exact_k − 1.

    Raises:
        ConfigError: a field is unknown, missing, of another type, or not allowed; all named.
    """

    format: ClassVar[str] = "quantized"

    d: int
    k: int
    exact_k: int
    exact_dtype: FloatName = "float32"
    polynomial_terms: list[Union[int, Literal["sqrt", "exp"]]] | None = None
    term_dtype: FloatName = "float32"
    residual_bins: list[ResidualBin]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False


class LegacyLogitCompressionConfig(_CodecModel):
    """The published legacy format (`legacy_logit_compression` in a YAML).

    Attributes:
        vocab_size: ids are 0 … vocab_size − 1 and take ⌈log₂ vocab_size⌉ bits.
        k: stored ids a row.
        exact_k: how many of the most probable are stored as float16 values.
        polynomial_degree: highest power of the polynomial over the other ranks.
        invert_polynomial: powers of 1/a instead of a, for a = 1, 2, …
        with_sqrt_term: one more term, √a.
        term_dtype: type of terms and coefficients.

    Raises:
        ConfigError: a field is unknown, missing, of another type, or not allowed; all named.
    """

    format: ClassVar[str] = "legacy"

    vocab_size: int
    k: int
    exact_k: int
    polynomial_degree: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: FloatName = "float32"


CodecConfig = Union[DistributionQuantizationConfig, LegacyLogitCompressionConfig]

_YAML_KEYS: dict[str, type[DistributionQuantizationConfig] | type[LegacyLogitCompressionConfig]] = {
    "logprob_compressor": DistributionQuantizationConfig,
    "legacy_logit_compression": LegacyLogitCompressionConfig,
}


def codec_config(config: CodecConfig | Mapping[str, Any]) -> CodecConfig:
    """A configuration from what a YAML holds.

    Args:
        config: a configuration (returned as it is), a mapping with one of the keys `logprob_compressor` and
        `legacy_logit_compression`
            (those of a training configuration's `teacher`), or the fields themselves (a published
            `compression_config.yaml`).

    Raises:
        ConfigError: it is none of these, or a field is wrong.

    Example:
        >>> config = {"d": 1000, "k": 8, "exact_k": 8, "exact_dtype": "float32", "residual_bins": []}
        >>> codec_config({**config, "delta_encoding": False}).format
        'quantized'
    """
    if isinstance(config, (DistributionQuantizationConfig, LegacyLogitCompressionConfig)):
        return config
    if not isinstance(config, Mapping):
        raise ConfigError(f"a codec configuration must be a mapping, found {type(config).__name__}: {config!r}")
    for key, cls in _YAML_KEYS.items():
        if key in config:
            others = sorted(str(name) for name in config if name != key)
            if others:
                raise ConfigError(f"a codec configuration has no keys beside {key}; found {', '.join(others)}")
            fields = config[key]
            if not isinstance(fields, Mapping):
                raise ConfigError(f"{key} must be a mapping, found {type(fields).__name__}: {fields!r}")
            return cls(**fields)
    if "d" in config:
        return DistributionQuantizationConfig(**config)
    if "vocab_size" in config:
        return LegacyLogitCompressionConfig(**config)
    raise ConfigError(
        f"not a codec configuration: found the keys {', '.join(sorted(map(str, config))) or '(none)'}, expected "
        "logprob_compressor, legacy_logit_compression, or the fields of one of them (with d, or with vocab_size)"
    )
