"""Codec configurations, with the field names of the published YAMLs.

The native code validates configurations and computes row sizes; the classes here name and document the fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from distillkit import _native
from distillkit.configuration.problems import find_problems
from distillkit.errors import ConfigError

__all__ = [
    "CODEC_KEYS",
    "CodecConfig",
    "CompactConfig",
    "DistributionQuantizationConfig",
    "FixedConfig",
    "LearnedConfig",
    "LegacyLogitCompressionConfig",
    "ResidualBin",
    "SampledConfig",
    "codec_config",
]

FloatName = Literal["float16", "bfloat16", "float32", "float64"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ResidualBin(_Model):
    """Quantised residuals of the next `num_elements` ranks: one scale, then one `element_bits`-bit code per rank."""

    scale_dtype: FloatName
    element_bits: int
    num_elements: int


class _CodecModel(_Model):
    format: ClassVar[str]

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            problems = "; ".join(map(str, find_problems(error, type(self))))
            raise ConfigError(f"{type(self).__name__}: {problems}") from None

    @model_validator(mode="after")
    def _check(self) -> _CodecModel:
        self._check_natively()
        return self

    def _check_natively(self) -> None:
        _native.Codec(self.format, self.model_dump_json())


class DistributionQuantizationConfig(_CodecModel):
    """The published "distribution quantization" (`logprob_compressor` in a YAML).

    Attributes:
        d: vocabulary size; ids are 0 … d − 1 and take ⌈log₂ d⌉ bits.
        k: stored ids per row.
        exact_k: number of top ranks stored individually, as `exact_dtype`.
        exact_dtype: float16, bfloat16, float32 or float64.
        polynomial_terms: terms of the polynomial fitted to the other ranks: integer powers, "sqrt", "exp".
        term_dtype: dtype of the coefficients.
        residual_bins: quantised residuals of the ranks after the exact ones, in order; may be empty.
        delta_encoding: store the first value, then differences. On by default, as published.
        error_diffusion: carry each quantisation error over to the next element (encoder only).
        normalize_t: evaluate the terms on [0, 1] instead of 0 … k − exact_k − 1.

    Raises:
        ConfigError: fields are unknown, missing, of the wrong type or invalid; the message names all of them.
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
        k: stored ids per row.
        exact_k: number of top ranks stored individually, as float16.
        polynomial_degree: degree of the polynomial fitted to the other ranks.
        invert_polynomial: use powers of 1/a instead of a, for a = 1, 2, …
        with_sqrt_term: add a term √a.
        term_dtype: dtype of terms and coefficients.

    Raises:
        ConfigError: fields are unknown, missing, of the wrong type or invalid; the message names all of them.
    """

    format: ClassVar[str] = "legacy"

    vocab_size: int
    k: int
    exact_k: int
    polynomial_degree: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: FloatName = "float32"


def _number(value: object) -> object:
    """YAML reads 5e-4 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_number)]


class LearnedConfig(_CodecModel):
    """A format that is coded with what a *prior* knows of the teacher, a document at a time.

    Attributes:
        vocab_size: ids are 0 … vocab_size − 1.
        prior: hash of the prior (`Prior.hash`), which is stored apart; None for the built-in one, which knows nothing
            of the teacher.
    """

    vocab_size: int
    prior: str | None = None

    def without_prior(self) -> Self:
        """The same configuration with the built-in prior."""
        return self.model_copy(update={"prior": None})

    def for_prior(self) -> Self:
        """What a prior is learned for: everything that it depends on."""
        return self.without_prior()


class CompactConfig(LearnedConfig):
    """The compact format (`compact` in a YAML): rows of varying length, coded with what a *prior* knows of the teacher.

    Attributes:
        vocab_size: ids are 0 … vocab_size − 1.
        k: stored ids per row, or the most of them if `threshold` or `mass` ends rows earlier.
        threshold: store only ids of at least this probability, and at least one; None: always k.
        mass: stop once the stored probability reaches this; None: always k.
        step: resolution of the stored values, in units of √p; halving it costs about 0.9 bits per id.
        prior: hash of the prior (`Prior.hash`), which is stored apart; None for the built-in one, which knows nothing
            of the teacher.

    Raises:
        ConfigError: fields are unknown, missing, of the wrong type or invalid; the message names all of them.
    """

    format: ClassVar[str] = "compact"

    vocab_size: int
    k: int
    threshold: Number | None = None
    mass: Number | None = None
    step: Number
    prior: str | None = None

    def _check_natively(self) -> None:
        # The prior's bytes are checked where they are at hand.
        _native.CompactCodec(self.without_prior().model_dump_json(), None)

    @property
    def adaptive(self) -> bool:
        """Whether rows may have fewer than k ids."""
        return self.threshold is not None or self.mass is not None


class SampledConfig(LearnedConfig):
    """The sampled format (`sampled` in a YAML): ids drawn from the teacher's distribution, and how often each was
    drawn. Only a teacher with all logits can be drawn from (`distillkit capture` with the transformers engine).

    Attributes:
        vocab_size: ids are 0 … vocab_size − 1.
        draws: draws per row, with replacement.
        temperature: the draws are from softmax(logits / temperature).
        seed: another seed makes other draws.
        prior: as for `CompactConfig`.

    Raises:
        ConfigError: fields are unknown, missing, of the wrong type or invalid; the message names all of them.
    """

    format: ClassVar[str] = "sampled"

    vocab_size: int
    draws: int
    temperature: Number = 1.0
    seed: int = 0
    prior: str | None = None

    def _check_natively(self) -> None:
        _native.SampledCodec(self.without_prior().model_dump_json(), None)

    def for_prior(self) -> SampledConfig:
        return SampledConfig(vocab_size=self.vocab_size, draws=self.draws)

    @property
    def k(self) -> int:
        """Most ids per row."""
        return min(self.draws, self.vocab_size)


FixedConfig = Union[DistributionQuantizationConfig, LegacyLogitCompressionConfig]
"""Formats in which each row has the same number of bytes."""

CodecConfig = Union[FixedConfig, CompactConfig, SampledConfig]

_YAML_KEYS: dict[str, type[CodecConfig]] = {
    "logprob_compressor": DistributionQuantizationConfig,
    "legacy_logit_compression": LegacyLogitCompressionConfig,
    "compact": CompactConfig,
    "sampled": SampledConfig,
}

CODEC_KEYS = tuple(_YAML_KEYS)
"""Under which key of a YAML the fields of which configuration are."""


def codec_config(config: CodecConfig | Mapping[str, Any]) -> CodecConfig:
    """Builds a codec configuration from the contents of a YAML file.

    Args:
        config: a configuration (returned unchanged), a mapping with the key `logprob_compressor`,
            `legacy_logit_compression` (as under `teacher` in a training configuration), `compact` or `sampled`, or the
            fields themselves (as in a published `compression_config.yaml`).

    Raises:
        ConfigError: `config` is none of these, or a field is invalid.

    Example:
        >>> config = {"d": 1000, "k": 8, "exact_k": 8, "exact_dtype": "float32", "residual_bins": []}
        >>> codec_config({**config, "delta_encoding": False}).format
        'quantized'
    """
    if isinstance(config, (DistributionQuantizationConfig, LegacyLogitCompressionConfig, CompactConfig, SampledConfig)):
        return config
    if not isinstance(config, Mapping):
        raise ConfigError(f"a codec configuration must be a mapping, found {type(config).__name__}: {config!r:.200}")
    for key, cls in _YAML_KEYS.items():
        if key in config:
            others = sorted(str(name) for name in config if name != key)
            if others:
                found = ", ".join(others)
                raise ConfigError(f"a codec configuration must have no keys besides {key}; found {found:.200}")
            fields = config[key]
            if not isinstance(fields, Mapping):
                raise ConfigError(f"{key} must be a mapping, found {type(fields).__name__}: {fields!r:.200}")
            return cls(**_named(fields))
    if "d" in config:
        return DistributionQuantizationConfig(**_named(config))
    if "vocab_size" in config and "step" in config:
        return CompactConfig(**_named(config))
    if "vocab_size" in config and "draws" in config:
        return SampledConfig(**_named(config))
    if "vocab_size" in config:
        return LegacyLogitCompressionConfig(**_named(config))
    keys = ", ".join(sorted(map(str, config))) or "(none)"
    raise ConfigError(
        f"not a codec configuration: found the keys {keys:.200}; expected "
        f"{', '.join(CODEC_KEYS)}, or the fields of one of them (including d or vocab_size)"
    )


def _named(fields: Mapping[Any, Any]) -> Mapping[str, Any]:
    """The fields, after checking that their keys are text."""
    others = [key for key in fields if not isinstance(key, str)]
    if others:
        raise ConfigError(f"a codec configuration must have text as keys; found {others[0]!r:.200}")
    return fields
