"""The decoder in torch operations, for rows that are on a device.

It computes what rust/codec computes, in the same order: see rust/codec/FORMAT.md §2.3 and §3.3.

Bits are never spread out. The bytes of a row become *windows* once: 64-bit integers that begin at every 32nd bit of
the stream. A value of up to 33 bits lies in one window whole, so it takes a gather, a shift and a mask, all of them
over the whole batch and written straight into the output; wider values take the 32 bits after their window besides.

On a CPU, rows are decoded some hundreds at a time, so that what is in between stays in the cache; on other devices, and
when compiled, all at once.

Shape legend: N rows, B bytes of a part, C values of a part, J windows of a part, k stored ids, n approximated ranks, m
terms.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from distillkit import _native
from distillkit.codec.config import (
    CodecConfig,
    DistributionQuantizationConfig,
    LegacyLogitCompressionConfig,
    codec_config,
)
from distillkit.errors import DistillKitError, InputError

__all__ = ["TorchDecoder", "unpack_bits"]

_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}

_CHUNK_VALUES = 1 << 18
"""Values (rows × k) that a thread decodes at a time on a CPU: large enough that calling torch costs little, small
enough for the cache."""


class _Positions(NamedTuple):
    """Where the values of a part lie: C values of `width` bits in the windows of a row.

    Attributes:
        window: (C,) int64, the window that a value begins in.
        shift: (C,) int64: how far the window is shifted right to bring the value to its end; for values that do not
            fit into one window, how far left to bring it to its beginning.
        width: bits of a value.
    """

    window: torch.Tensor
    shift: torch.Tensor
    width: int


def _stream_positions(width: int, count: int, device: torch.device) -> _Positions:
    """Values one after the other, most significant bit first (FORMAT.md §1), in the windows of `_windows`."""
    first_bit = torch.arange(count, device=device) * width
    offset = first_bit % 32
    return _Positions(first_bit // 32, 64 - width - offset if width <= 33 else offset, width)


def _word_positions(width: int, count: int, device: torch.device) -> _Positions:
    """Values in 64-bit words, the first in the lowest bits (FORMAT.md §3.2)."""
    value = torch.arange(count, device=device)
    per_word = 64 // width
    return _Positions(value // per_word, value % per_word * width, width)


def _words(data_NB: torch.Tensor, words: int) -> torch.Tensor:
    """The stream in words of 32 bits, (N, words) int32; zeros follow the last byte."""
    padded = data_NB.new_zeros((data_NB.shape[0], 4 * words))
    padded[:, : data_NB.shape[1]].copy_(data_NB)
    word = padded.view(torch.int32)
    # They are read little-endian: exchange neighbouring bytes, then the halves.
    word = (word >> 8).bitwise_and_(0x00FF00FF).bitwise_or_((word & 0x00FF00FF).bitwise_left_shift_(8))
    return (word >> 16).bitwise_and_(0xFFFF).bitwise_or_(word << 16)


def _windows(data_NB: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """The 64 bits of the stream from bit 32·j on, (N, J) int64."""
    words = _words(data_NB, (count - 1) * width // 32 + (2 if width <= 33 else 3))
    windows_NJ = words[:, :-1].long().bitwise_left_shift_(32)
    return windows_NJ.bitwise_or_(words[:, 1:].long().bitwise_and_(0xFFFFFFFF))


def _extract(windows_NJ: torch.Tensor, at: _Positions, out_NC: torch.Tensor) -> None:
    """Values of at most 33 bits, or of a word: one window each."""
    torch.gather(windows_NJ, 1, at.window.expand(out_NC.shape[0], -1), out=out_NC)
    out_NC.bitwise_right_shift_(at.shift).bitwise_and_((1 << at.width) - 1)


def _extract_wide(windows_NJ: torch.Tensor, at: _Positions, out_NC: torch.Tensor) -> None:
    """Values of 34 to 64 bits: a window without the bits before the value, and the 32 bits that follow it."""
    window = at.window.expand(out_NC.shape[0], -1)
    torch.gather(windows_NJ, 1, window, out=out_NC)
    following = torch.gather(windows_NJ, 1, window + 1).bitwise_and_(0xFFFFFFFF)
    out_NC.bitwise_left_shift_(at.shift).bitwise_or_(following.bitwise_right_shift_(32 - at.shift))
    if at.width < 64:
        out_NC.bitwise_right_shift_(64 - at.width).bitwise_and_((1 << at.width) - 1)


def _unpack(data_NB: torch.Tensor, at: _Positions, out_NC: torch.Tensor | None = None) -> torch.Tensor:
    """The values of a part, (N, C) int64; C ≥ 1."""
    count = at.window.shape[0]
    if out_NC is None:
        out_NC = torch.empty((data_NB.shape[0], count), dtype=torch.int64, device=data_NB.device)
    if at.width == 16:
        # Vocabularies of 32,769 … 65,536 ids are common, and whole bytes take half the time.
        halves = data_NB.clone(memory_format=torch.contiguous_format).view(torch.int16)
        out_NC.copy_((halves << 8).bitwise_or_((halves >> 8).bitwise_and_(0xFF))).bitwise_and_(0xFFFF)
    elif at.width <= 33:
        _extract(_windows(data_NB, at.width, count), at, out_NC)
    else:
        _extract_wide(_windows(data_NB, at.width, count), at, out_NC)
    return out_NC


def unpack_bits(data_NB: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Unpacks `count` values of `width` bits from each row, most significant bit first.

    Args:
        data_NB: (N, B) uint8 with B = ceil(count·width / 8).

    Returns:
        (N, count) int64; values of 64 bits are their two's complement.
    """
    if count == 0:
        return torch.empty((data_NB.shape[0], 0), dtype=torch.int64, device=data_NB.device)
    return _unpack(data_NB, _stream_positions(width, count, data_NB.device))


def _floats(data_NB: torch.Tensor, name: str) -> torch.Tensor:
    """Little-endian floats of a row's bytes: (N, B) uint8 → (N, C)."""
    if data_NB.shape[1] == 0:
        return torch.zeros(data_NB.shape, dtype=_DTYPES[name], device=data_NB.device)
    # A copy of their own aligns them, whatever the bytes before them.
    return data_NB.clone(memory_format=torch.contiguous_format).view(_DTYPES[name])


def _polynomial(coefficients_Nm: torch.Tensor, terms_mn: torch.Tensor) -> torch.Tensor:
    """Σ coefficient · term, (N, n): products and sums in term order, each rounded, as the native decoder does it."""
    shape, kind = (coefficients_Nm.shape[0], terms_mn.shape[1]), terms_mn.dtype
    if terms_mn.shape[0] == 0:
        return torch.zeros(shape, dtype=kind, device=terms_mn.device)
    coefficients_Nm = coefficients_Nm.to(kind)
    total_Nn = coefficients_Nm[:, :1] * terms_mn[0]
    product_Nn = torch.empty_like(total_Nn)
    for term in range(1, terms_mn.shape[0]):
        # Two steps: one that multiplies and adds may round only once.
        torch.mul(coefficients_Nm[:, term : term + 1], terms_mn[term], out=product_Nn)
        total_Nn.add_(product_Nn)
    return total_Nn


def _dequantize(codes_NC: torch.Tensor, bits: int, scale_N1: torch.Tensor) -> torch.Tensor:
    """Values of the codes of a residual bin, float32; the codes are overwritten."""
    if bits == 1:
        centred = codes_NC.mul_(2).sub_(1)
    elif bits == 64:
        centred = codes_NC.bitwise_xor_(torch.iinfo(torch.int64).min)  # − 2⁶³, without overflow
    else:
        centred = codes_NC.sub_(1 << (bits - 1))
    return centred.float().mul_(scale_N1)


class _Constants(NamedTuple):
    """What a configuration needs on a device: terms (m, n), and where the ids and the codes of each bin lie."""

    terms_mn: torch.Tensor
    ids: _Positions
    bins: tuple[_Positions, ...]


class TorchDecoder:
    """Decodes rows of one configuration on the devices it was prepared for.

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
        self._on_device: dict[torch.device, _Constants] = {}

    def __call__(
        self, data: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes rows.

        Args:
            data: (..., bytes_per_token) uint8.
            out: contiguous tensors to fill, ids (..., k) int64 and logprobs (..., k) float32.

        Returns:
            ids (..., k) int64 and logprobs (..., k) float32, on the data's device; `out` where it is given.

        Raises:
            InputError: `out` has other shapes, dtypes or another device.
        """
        data_NB = data.reshape(-1, data.shape[-1])
        shape = (*data.shape[:-1], self._config.k)
        if out is None:
            ids = torch.empty(shape, dtype=torch.int64, device=data.device)
            logprobs = torch.empty(shape, dtype=torch.float32, device=data.device)
        else:
            ids, logprobs = out
            _check_output("ids", ids, shape, torch.int64, data.device)
            _check_output("logprobs", logprobs, shape, torch.float32, data.device)
        rows, k = len(data_NB), self._config.k
        ids_Nk, logprobs_Nk = ids.view(rows, k), logprobs.view(rows, k)
        constants = self._on_device[data.device]
        in_chunks = data.device.type == "cpu" and not torch.compiler.is_compiling()
        step = max(1, _CHUNK_VALUES * torch.get_num_threads() // k) if in_chunks else max(1, rows)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            self._decode(data_NB[part], constants, ids_Nk[part], logprobs_Nk[part])
        return ids, logprobs

    def prepare(self, device: torch.device) -> None:
        """Puts on a device what decoding needs there, once."""
        if device in self._on_device:
            return
        config = self._config
        # Tensors made in inference mode could not be used everywhere outside of it.
        with torch.inference_mode(False):
            if isinstance(config, DistributionQuantizationConfig):
                ids = _stream_positions(self._id_bits, config.k, device)
                bins = [_stream_positions(b.element_bits, b.num_elements, device) for b in config.residual_bins]
            else:
                ids, bins = _word_positions(self._id_bits, config.k, device), []
            self._on_device[device] = _Constants(self._terms.to(device), ids, tuple(bins))

    def _decode(
        self, data_NB: torch.Tensor, constants: _Constants, ids_Nk: torch.Tensor, logprobs_Nk: torch.Tensor
    ) -> None:
        if isinstance(self._config, DistributionQuantizationConfig):
            ids_at = self._quantized(data_NB, self._config, constants, logprobs_Nk)
            _unpack(data_NB[:, ids_at:], constants.ids, ids_Nk)
        else:
            ids_at = self._legacy(data_NB, self._config, constants, logprobs_Nk)
            words = data_NB[:, ids_at:].clone(memory_format=torch.contiguous_format).view(torch.int64)
            _extract(words, constants.ids, ids_Nk)

    def _quantized(
        self,
        data_NB: torch.Tensor,
        config: DistributionQuantizationConfig,
        constants: _Constants,
        logprobs_Nk: torch.Tensor,
    ) -> int:
        """Decodes the values, which come first; returns how many bytes of a row they take."""
        at = 0

        def take(size: int) -> torch.Tensor:
            nonlocal at
            part = data_NB[:, at : at + size]
            at += size
            return part

        terms_mn = constants.terms_mn
        exact = _floats(take(config.exact_k * _DTYPES[config.exact_dtype].itemsize), config.exact_dtype)
        coefficients = _floats(take(terms_mn.shape[0] * _DTYPES[config.term_dtype].itemsize), config.term_dtype)
        values_Nn = _polynomial(coefficients, terms_mn)
        first = 0
        for bin_, positions in zip(config.residual_bins, constants.bins, strict=True):
            scale_N1 = _floats(take(_DTYPES[bin_.scale_dtype].itemsize), bin_.scale_dtype).float()
            codes = take(-(-bin_.num_elements * bin_.element_bits // 8))
            residuals = _dequantize(_unpack(codes, positions), bin_.element_bits, scale_N1)
            values_Nn[:, first : first + bin_.num_elements].add_(residuals)
            first += bin_.num_elements
        # Running sums are float64, and rounded only then (FORMAT.md §2.3).
        sequence_Nk = torch.empty_like(logprobs_Nk, dtype=torch.float64) if config.delta_encoding else logprobs_Nk
        sequence_Nk[:, : config.exact_k].copy_(exact)
        sequence_Nk[:, config.exact_k :].copy_(values_Nn)
        if config.delta_encoding:
            logprobs_Nk.copy_(sequence_Nk.cumsum_(1))
        return at

    def _legacy(
        self,
        data_NB: torch.Tensor,
        config: LegacyLogitCompressionConfig,
        constants: _Constants,
        logprobs_Nk: torch.Tensor,
    ) -> int:
        """As `_quantized`."""
        stored = "float32" if config.term_dtype == "float64" else config.term_dtype
        split = 2 * config.exact_k
        ids_at = split + constants.terms_mn.shape[0] * int(_DTYPES[stored].itemsize)
        logprobs_Nk[:, : config.exact_k].copy_(_floats(data_NB[:, :split], "float16"))
        coefficients = _floats(data_NB[:, split:ids_at], stored)
        logprobs_Nk[:, config.exact_k :].copy_(_polynomial(coefficients, constants.terms_mn))
        return ids_at


def _check_output(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise InputError(
            f"out: {name} must be a contiguous {dtype} tensor of shape {shape} on {device}, got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device}"
        )


_DECODERS: dict[tuple[str, str], TorchDecoder] = {}


# A compiler runs it as it is, and takes what it leaves in _DECODERS.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepared(format_name: str, config_json: str, device: torch.device) -> bool:
    key = (format_name, config_json)
    if key not in _DECODERS:
        native = _native.Codec(format_name, config_json)
        _DECODERS[key] = TorchDecoder(codec_config(json.loads(config_json)), native.terms(), native.id_bits)
    _DECODERS[key].prepare(device)
    return True


def decoder_for(format_name: str, config_json: str, device: torch.device) -> TorchDecoder:
    """The decoder of a configuration, made once in a process, ready for a device.

    Args:
        format_name, config_json: as the native codec takes them.
    """
    _prepared(format_name, config_json, device)
    return _DECODERS[format_name, config_json]


if torch.tensor([1], dtype=torch.int16).view(torch.uint8)[0] != 1:
    raise DistillKitError("decode_torch needs a little-endian machine; use Codec.decode")
