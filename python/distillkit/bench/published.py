"""The baseline: a straightforward batched torch implementation of the published algorithm for the published layouts.

It serves as a benchmark reference only. It fits by least squares, with a float32 singular value decomposition that
drops singular values below an absolute 1e-5, packs every id and code by way of a tensor of its bits, and sums in
`term_dtype`. Its bytes follow rust/codec/FORMAT.md and are interchangeable with those of `distillkit.codec`; its
decoding rounds like the published decoder.

Shape legend: N rows, k stored ids per row, n approximated ranks, m terms, C values of w bits each, B bytes, V
vocabulary size.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from distillkit.codec.config import (
    DistributionQuantizationConfig,
    FixedConfig,
    LegacyLogitCompressionConfig,
    ResidualBin,
)
from distillkit.errors import ConfigError

__all__ = ["PublishedCodec", "is_resolved", "published_codec", "term_matrix"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_CUTOFF = 1e-5
"""Singular values below this count as zero, however large the largest one is."""
_RESOLUTION = 2.0**-23
"""Float32 resolution of singular values, relative to the largest one."""
_WIDEST_CODE = 53


class PublishedCodec(Protocol):
    """Rows ↔ bytes: the bytes of the values, then those of the ids."""

    def encode(self, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        """(N, k) int64 and (N, k) float32 → (N, B) uint8."""

    def decode(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, B) uint8 → (N, k) int64 and (N, k) float32, in rank order."""

    def encode_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """(N, V) logits → (N, B) uint8."""


def published_codec(config: FixedConfig, order_n: torch.Tensor | None = None) -> PublishedCodec:
    """The baseline for a configuration.

    Args:
        order_n: permutation of the approximated ranks to apply before the decomposition. All orders give the same
            pseudo-inverse, up to float32 rounding errors (see `is_resolved`).

    Raises:
        ConfigError: residual codes have more than 53 bits, which the baseline does not support.
    """
    if isinstance(config, LegacyLogitCompressionConfig):
        return _Legacy(config, order_n)
    return _Quantized(config, order_n)


def is_resolved(config: FixedConfig) -> bool:
    """Whether float32 resolves all singular values of the terms.

    If not, the smallest singular values that the published encoder divides by are rounding errors relative to the
    largest one. They are far above its cutoff, so it keeps them, and its coefficients depend on the order of additions,
    and thus on the processor, the library and the number of threads.
    """
    terms_mn = term_matrix(config)
    if not terms_mn.numel():
        return True
    singular = torch.linalg.svdvals(terms_mn.T)
    return bool(singular[-1] > _RESOLUTION * singular[0])


def term_matrix(config: FixedConfig) -> torch.Tensor:
    """The terms at the approximated ranks: (m, n) float64, not yet rounded to `term_dtype`."""
    n = config.k - config.exact_k
    if isinstance(config, LegacyLogitCompressionConfig):
        t = torch.arange(1, n + 1, dtype=torch.float64)
        sign = -1 if config.invert_polynomial else 1
        terms = [t ** (sign * power) for power in range(config.polynomial_degree + 1)]
        if config.with_sqrt_term:
            terms.append(t.sqrt())
        return torch.stack(terms) if n else torch.zeros(0, 0, dtype=torch.float64)
    t = torch.arange(n, dtype=torch.float64)
    if config.normalize_t:
        t = torch.linspace(0, 1, n, dtype=torch.float64)
    named = {"sqrt": torch.sqrt, "exp": torch.exp}
    terms = [named[term](t) if isinstance(term, str) else t**term for term in config.polynomial_terms or ()]
    return torch.stack(terms) if terms else torch.zeros(0, n, dtype=torch.float64)


def _pseudo_inverse(terms_mn: torch.Tensor, order_n: torch.Tensor | None) -> torch.Tensor:
    """(n, m) float32 pseudo-inverse P with coefficients = values @ P, by SVD in float32 with the absolute cutoff."""
    if order_n is not None:
        return _pseudo_inverse(terms_mn[:, order_n], None)[order_n.argsort()]
    u, singular, vt = torch.linalg.svd(terms_mn.float().T, full_matrices=False)
    inverse = torch.where(singular > _CUTOFF, 1 / singular, 0.0)
    pseudo_inverse: torch.Tensor = (u * inverse) @ vt
    return pseudo_inverse


def _pack_bits(values_NC: torch.Tensor, width: int) -> torch.Tensor:
    """The lowest `width` bits of int64 values as a bit stream, most significant bit first: (N, B) uint8."""
    shifts = torch.arange(width - 1, -1, -1)
    bits = ((values_NC.unsqueeze(-1) >> shifts) & 1).flatten(1)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8))
    weights = 1 << torch.arange(7, -1, -1)
    packed: torch.Tensor = (bits.reshape(len(bits), -1, 8) * weights).sum(-1).to(torch.uint8)
    return packed


def _unpack_bits(data_NB: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """The inverse of `_pack_bits`: (N, count) int64."""
    bits = ((data_NB.long().unsqueeze(-1) >> torch.arange(7, -1, -1)) & 1).flatten(1)
    bits = bits[:, : count * width].reshape(-1, count, width)
    values: torch.Tensor = (bits << torch.arange(width - 1, -1, -1)).sum(-1)
    return values


def _bytes(values_NC: torch.Tensor) -> torch.Tensor:
    return values_NC.contiguous().view(torch.uint8)


def _floats(data_NB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return data_NB.contiguous().view(dtype) if data_NB.shape[1] else torch.zeros(data_NB.shape, dtype=dtype)


class _Quantized:
    def __init__(self, config: DistributionQuantizationConfig, order_n: torch.Tensor | None) -> None:
        for number, bin_ in enumerate(config.residual_bins):
            if bin_.element_bits > _WIDEST_CODE:
                raise ConfigError(
                    f"residual_bins.{number}.element_bits: the baseline has codes of at most {_WIDEST_CODE} bits, "
                    f"found {bin_.element_bits}"
                )
        self._config = config
        self._exact_dtype = _DTYPES[config.exact_dtype]
        self._id_bits = math.ceil(math.log2(config.d))
        exact = term_matrix(config)
        self._terms_mn = exact.to(_DTYPES[config.term_dtype])
        self._inverse_nm = _pseudo_inverse(self._terms_mn, order_n) if len(exact) else None

    def encode(self, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        config = self._config
        values, order = logprobs.float().sort(dim=-1, descending=True)
        ids = ids.gather(-1, order)
        if config.delta_encoding:
            values = torch.cat((values[:, :1], values.diff(dim=-1)), dim=-1)
        parts = [_bytes(values[:, : config.exact_k].to(self._exact_dtype))]
        rest_Nn = values[:, config.exact_k :]
        if self._inverse_nm is not None:
            coefficients_Nm = (rest_Nn @ self._inverse_nm).to(self._terms_mn.dtype)
            parts.append(_bytes(coefficients_Nm))
            rest_Nn = rest_Nn - (coefficients_Nm @ self._terms_mn).float()
        carried_N = torch.zeros(len(rest_Nn))
        at = 0
        for bin_ in config.residual_bins:
            residuals = rest_Nn[:, at : at + bin_.num_elements]
            scale_N1 = _bin_scale(residuals, bin_)
            steps = residuals / scale_N1.float()
            if config.error_diffusion:
                codes, carried_N = _diffused_codes(steps, bin_.element_bits, carried_N)
            else:
                codes = _codes(steps, bin_.element_bits)
            parts += [_bytes(scale_N1), _pack_bits(codes, bin_.element_bits)]
            at += bin_.num_elements
        return torch.cat((*parts, _pack_bits(ids, self._id_bits)), dim=-1)

    def decode(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config, at = self._config, 0

        def take(size: int) -> torch.Tensor:
            nonlocal at
            at += size
            return data[:, at - size : at]

        exact = _floats(take(config.exact_k * self._exact_dtype.itemsize), self._exact_dtype)
        rest_Nn = torch.zeros(len(data), config.k - config.exact_k)
        if self._inverse_nm is not None:
            size = len(self._terms_mn) * self._terms_mn.dtype.itemsize
            rest_Nn = _floats(take(size), self._terms_mn.dtype) @ self._terms_mn
        residuals_Nn = torch.zeros(len(data), config.k - config.exact_k, dtype=self._exact_dtype)
        filled = 0
        for bin_ in config.residual_bins:
            scale_N1 = _floats(take(_DTYPES[bin_.scale_dtype].itemsize), _DTYPES[bin_.scale_dtype]).float()
            packed = take(-(-bin_.num_elements * bin_.element_bits // 8))
            codes = _unpack_bits(packed, bin_.element_bits, bin_.num_elements)
            centred = 2 * codes - 1 if bin_.element_bits == 1 else codes - 2 ** (bin_.element_bits - 1)
            residuals_Nn[:, filled : filled + bin_.num_elements] = (centred.float() * scale_N1).to(self._exact_dtype)
            filled += bin_.num_elements
        sequence = torch.cat((exact, (rest_Nn + residuals_Nn)), dim=-1)
        if config.delta_encoding:
            sequence = sequence.float().cumsum(-1).to(self._exact_dtype)
        return _unpack_bits(data[:, at:], self._id_bits, config.k), sequence.float()

    def encode_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return self.encode(*_top(logits, self._config.k))


def _bin_scale(residuals_NC: torch.Tensor, bin_: ResidualBin) -> torch.Tensor:
    """(N, 1) in `scale_dtype`: maps the largest residual to the outermost code; 1 where all residuals are zero.

    As published, a scale too small for `scale_dtype` becomes 0, which makes its codes meaningless.
    """
    largest = residuals_NC.abs().amax(-1, keepdim=True)
    scale = largest if bin_.element_bits == 1 else largest / 2 ** (bin_.element_bits - 1)
    return torch.where(largest == 0, 1, scale).to(_DTYPES[bin_.scale_dtype])


def _codes(steps: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of residuals in units of their scale. One-bit codes are as published, which loses the sign."""
    if bits == 1:
        return steps.clamp(0, 1).round().long()
    half = 2 ** (bits - 1)
    # float64 represents the largest code exactly; float32 only up to 25 bits. Scales of 0 produce infinities, and error
    # diffusion turns these into NaN, which is mapped to the lowest code, like a conversion to integer.
    codes: torch.Tensor = steps.double().round().clamp(-half, half - 1).nan_to_num(nan=-half).long() + half
    return codes


def _diffused_codes(steps_NC: torch.Tensor, bits: int, carried_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `_codes`, but adds each element's error to the next one. Also returns the last error, for the next bin."""
    codes = torch.empty(steps_NC.shape, dtype=torch.long)
    for column in range(steps_NC.shape[1]):
        wanted_N = steps_NC[:, column] + carried_N
        codes[:, column] = _codes(wanted_N, bits)
        carried_N = wanted_N - (codes[:, column] if bits == 1 else codes[:, column] - 2 ** (bits - 1)).float()
    return codes, carried_N


class _Legacy:
    def __init__(self, config: LegacyLogitCompressionConfig, order_n: torch.Tensor | None) -> None:
        self._config = config
        self._id_bits = math.ceil(math.log2(config.vocab_size))
        dtype = _DTYPES[config.term_dtype]
        self._terms_mn = term_matrix(config).to(dtype)
        # The published column is float32, so wider coefficients were rounded.
        self._stored = torch.float32 if dtype == torch.float64 else dtype
        self._inverse_nm = _pseudo_inverse(self._terms_mn, order_n) if config.exact_k < config.k else None

    def encode(self, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        exact_k = self._config.exact_k
        values, order = logprobs.float().sort(dim=-1, descending=True)
        parts = [_bytes(values[:, :exact_k].half())]
        if self._inverse_nm is not None:
            parts.append(_bytes((values[:, exact_k:] @ self._inverse_nm).to(self._stored)))
        ids, per_word = ids.gather(-1, order), 64 // self._id_bits
        ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % per_word)).reshape(len(ids), -1, per_word)
        words = torch.zeros(ids.shape[:2], dtype=torch.long)
        for place in range(per_word):
            words |= ids[:, :, place] << (place * self._id_bits)
        return torch.cat((*parts, _bytes(words)), dim=-1)

    def decode(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, exact_k = self._config.k, self._config.exact_k
        split = 2 * exact_k
        ids_at = split + len(self._terms_mn) * self._stored.itemsize
        values = [_floats(data[:, :split], torch.float16).float()]
        if self._inverse_nm is not None:
            coefficients = _floats(data[:, split:ids_at], self._stored).to(self._terms_mn.dtype)
            values.append((coefficients @ self._terms_mn).float())
        words = data[:, ids_at:].contiguous().view(torch.long)
        mask = (1 << self._id_bits) - 1
        ids = [(words >> (place * self._id_bits)) & mask for place in range(64 // self._id_bits)]
        return torch.stack(ids, dim=-1).flatten(1)[:, :k], torch.cat(values, dim=-1)

    def encode_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return self.encode(*_top(logits, self._config.k))


def _top(logits_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, ids = torch.log_softmax(logits_NV.float(), dim=-1).topk(k, dim=-1)
    return ids, logprobs
