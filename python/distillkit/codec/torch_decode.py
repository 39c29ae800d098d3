"""The decoder in torch operations, for rows that are on a device.

It computes what rust/codec computes, in the same order: see rust/codec/FORMAT.md §2.3 and §3.3.

Shape legend: N rows, B bytes of a part, C values of a part, k stored ids, n approximated ranks, m terms.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from distillkit.codec.config import CodecConfig, DistributionQuantizationConfig, LegacyLogitCompressionConfig
from distillkit.errors import DistillKitError

__all__ = ["TorchDecoder", "unpack_bits"]

_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def unpack_bits(data_NB: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Unpacks `count` values of `width` bits from each row, most significant bit first.

    Args:
        data_NB: (N, B) uint8 with B = ceil(count·width / 8).

    Returns:
        (N, count) int64; values of 64 bits are their two's complement.
    """
    first_bit = torch.arange(count, device=data_NB.device) * width
    first_byte, shift = first_bit // 8, first_bit % 8
    # A value lies in at most `span` bytes from the byte of its first bit on; the last ones would reach past the end
    # of the row.
    span = min((7 + width + 7) // 8, 8)
    padded = torch.nn.functional.pad(data_NB, (0, 9))
    word = torch.zeros((data_NB.shape[0], count), dtype=torch.int64, device=data_NB.device)
    for byte in range(span):
        word = (word << 8) | padded[:, first_byte + byte]
    if width <= 57:
        return (word >> (8 * span - width - shift)) & ((1 << width) - 1)
    # Up to 7 + 64 bits: the low bits of a ninth byte follow.
    word = (word << shift) | (padded[:, first_byte + 8].to(torch.int64) >> (8 - shift))
    return word if width == 64 else (word >> (64 - width)) & ((1 << width) - 1)


def _floats(data_NB: torch.Tensor, name: str) -> torch.Tensor:
    """Little-endian floats of a row's bytes: (N, B) uint8 → (N, C)."""
    if data_NB.shape[1] == 0:
        return torch.zeros(data_NB.shape, dtype=_DTYPES[name], device=data_NB.device)
    # A copy of their own aligns them, whatever the bytes before them.
    return data_NB.clone(memory_format=torch.contiguous_format).view(_DTYPES[name])


def _polynomial(coefficients_Nm: torch.Tensor, terms_mn: torch.Tensor) -> torch.Tensor:
    """Σ coefficient · term, (N, n): products and sums in term order, each rounded, as the native decoder does it."""
    total = torch.zeros(
        (coefficients_Nm.shape[0], terms_mn.shape[1]), dtype=terms_mn.dtype, device=coefficients_Nm.device
    )
    for term in range(terms_mn.shape[0]):
        total = total + coefficients_Nm[:, term : term + 1].to(terms_mn.dtype) * terms_mn[term]
    return total


def _dequantize(codes_NC: torch.Tensor, bits: int, scale_N1: torch.Tensor) -> torch.Tensor:
    """Values of the codes of a residual bin, float32."""
    if bits == 1:
        centred = 2 * codes_NC - 1
    elif bits == 64:
        centred = codes_NC ^ torch.iinfo(torch.int64).min  # − 2⁶³, without overflow
    else:
        centred = codes_NC - (1 << (bits - 1))
    return centred.float() * scale_N1


class TorchDecoder:
    """Decodes rows of one configuration on whatever device they are.

    Args:
        config: the codec's configuration.
        terms_mn: (m, n) float64, the terms at the approximated ranks, from the native code.
        id_bits: bits of an id.
    """

    def __init__(self, config: CodecConfig, terms_mn: npt.NDArray[np.float64], id_bits: int) -> None:
        self._config = config
        self._id_bits = id_bits
        wide = isinstance(config, DistributionQuantizationConfig) and config.term_dtype == "float64"
        self._terms = torch.from_numpy(terms_mn).to(torch.float64 if wide else torch.float32)
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def __call__(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., bytes_per_token) uint8 → ids (..., k) int64, logprobs (..., k) float32."""
        data_NB = data.reshape(-1, data.shape[-1])
        if isinstance(self._config, DistributionQuantizationConfig):
            ids, logprobs = self._quantized(data_NB, self._config)
        else:
            ids, logprobs = self._legacy(data_NB, self._config)
        shape = (*data.shape[:-1], self._config.k)
        return ids.reshape(shape), logprobs.reshape(shape)

    def _terms_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._on_device:
            self._on_device[device] = self._terms.to(device)
        return self._on_device[device]

    def _quantized(
        self, data_NB: torch.Tensor, config: DistributionQuantizationConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = 0

        def take(size: int) -> torch.Tensor:
            nonlocal at
            part = data_NB[:, at : at + size]
            at += size
            return part

        terms_mn = self._terms_on(data_NB.device)
        exact = _floats(take(config.exact_k * _DTYPES[config.exact_dtype].itemsize), config.exact_dtype)
        coefficients = _floats(take(terms_mn.shape[0] * _DTYPES[config.term_dtype].itemsize), config.term_dtype)
        values_Nn = _polynomial(coefficients, terms_mn)
        residuals = []
        for bin_ in config.residual_bins:
            scale_N1 = _floats(take(_DTYPES[bin_.scale_dtype].itemsize), bin_.scale_dtype).float()
            codes = unpack_bits(
                take(-(-bin_.num_elements * bin_.element_bits // 8)), bin_.element_bits, bin_.num_elements
            )
            residuals.append(_dequantize(codes, bin_.element_bits, scale_N1))
        if residuals:
            covered = torch.cat(residuals, dim=1)
            values_Nn = values_Nn + torch.nn.functional.pad(covered, (0, values_Nn.shape[1] - covered.shape[1]))
        sequence = torch.cat((exact.double(), values_Nn.double()), dim=1)
        logprobs = sequence.cumsum(dim=1) if config.delta_encoding else sequence
        return unpack_bits(data_NB[:, at:], self._id_bits, config.k), logprobs.float()

    def _legacy(self, data_NB: torch.Tensor, config: LegacyLogitCompressionConfig) -> tuple[torch.Tensor, torch.Tensor]:
        terms_mn = self._terms_on(data_NB.device)
        stored = "float32" if config.term_dtype == "float64" else config.term_dtype
        split = 2 * config.exact_k
        ids_at = split + terms_mn.shape[0] * _DTYPES[stored].itemsize
        exact = _floats(data_NB[:, :split], "float16").float()
        values_Nn = _polynomial(_floats(data_NB[:, split:ids_at], stored), terms_mn)
        words = data_NB[:, ids_at:].clone(memory_format=torch.contiguous_format).view(torch.int64)
        per_word = 64 // self._id_bits
        shifts = torch.arange(per_word, device=data_NB.device) * self._id_bits
        mask = (1 << self._id_bits) - 1
        ids = ((words.unsqueeze(-1) >> shifts) & mask).flatten(1)[:, : config.k]
        return ids, torch.cat((exact, values_Nn), dim=1)


if torch.tensor([1], dtype=torch.int16).view(torch.uint8)[0] != 1:
    raise DistillKitError("decode_torch needs a little-endian machine; use Codec.decode")
