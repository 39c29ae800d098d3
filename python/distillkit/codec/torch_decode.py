"""The decoder in torch operations, for rows on any device.

It computes what rust/codec computes, in the same order: see rust/codec/FORMAT.md §2.3 and §3.3.

Bits are never expanded to one element each. The bytes of a row are converted once to *windows*: 64-bit integers that
start at every 32nd bit of the stream. A value of up to 33 bits lies entirely within one window, so extracting it takes
a gather, a shift and a mask, each over the entire batch and directly into the output. Wider values also need the 32
bits that follow their window.

On a CPU, rows are decoded a few hundred at a time, so that intermediate results stay in the cache; on other devices,
and when compiled, all at once.

A "part" is a section of a row's bytes, such as the ids or the codes of one bin.

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
    DistributionQuantizationConfig,
    FixedConfig,
    LegacyLogitCompressionConfig,
    codec_config,
)
from distillkit.errors import DistillKitError, InputError

__all__ = ["TorchDecoder", "unpack_bits"]

_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}

_CHUNK_VALUES = 1 << 18
"""Values (rows × k) that a CPU thread decodes at a time: enough to make torch's call overhead negligible, few enough
for the cache."""


class _Positions(NamedTuple):
    """Positions of a part's C values, `width` bits each, within the windows of a row.

    Attributes:
        window: (C,) int64, the window in which a value starts.
        shift: (C,) int64, the right shift that moves the value to the low end of its window; for values too wide for
            one window, the left shift that moves it to the high end.
        width: bits per value.
    """

    window: torch.Tensor
    shift: torch.Tensor
    width: int


def _stream_positions(width: int, count: int, device: torch.device) -> _Positions:
    """Positions of consecutive values, most significant bit first (FORMAT.md §1), in the windows of `_windows`."""
    first_bit = torch.arange(count, device=device) * width
    offset = first_bit % 32
    return _Positions(first_bit // 32, 64 - width - offset if width <= 33 else offset, width)


def _word_positions(width: int, count: int, device: torch.device) -> _Positions:
    """Positions of values in 64-bit words, the first in the lowest bits (FORMAT.md §3.2)."""
    value = torch.arange(count, device=device)
    per_word = 64 // width
    return _Positions(value // per_word, value % per_word * width, width)


def _words(data_NB: torch.Tensor, words: int) -> torch.Tensor:
    """The stream as 32-bit words, (N, words) int32, zero-padded at the end."""
    padded = data_NB.new_zeros((data_NB.shape[0], 4 * words))
    padded[:, : data_NB.shape[1]].copy_(data_NB)
    word = padded.view(torch.int32)
    # The view is little-endian: swap adjacent bytes, then the halves.
    word = (word >> 8).bitwise_and_(0x00FF00FF).bitwise_or_((word & 0x00FF00FF).bitwise_left_shift_(8))
    return (word >> 16).bitwise_and_(0xFFFF).bitwise_or_(word << 16)


def _windows(data_NB: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """(N, J) int64: window j holds the 64 bits of the stream that start at bit 32·j."""
    words = _words(data_NB, (count - 1) * width // 32 + (2 if width <= 33 else 3))
    windows_NJ = words[:, :-1].long().bitwise_left_shift_(32)
    return windows_NJ.bitwise_or_(words[:, 1:].long().bitwise_and_(0xFFFFFFFF))


def _extract(windows_NJ: torch.Tensor, at: _Positions, out_NC: torch.Tensor) -> None:
    """Extracts values that lie within one window: up to 33 bits of a stream, or any in a 64-bit word."""
    torch.gather(windows_NJ, 1, at.window.expand(out_NC.shape[0], -1), out=out_NC)
    out_NC.bitwise_right_shift_(at.shift).bitwise_and_((1 << at.width) - 1)


def _extract_wide(windows_NJ: torch.Tensor, at: _Positions, out_NC: torch.Tensor) -> None:
    """Extracts values of 34 to 64 bits: a window without the bits before the value, and the 32 bits that follow it."""
    window = at.window.expand(out_NC.shape[0], -1)
    torch.gather(windows_NJ, 1, window, out=out_NC)
    following = torch.gather(windows_NJ, 1, window + 1).bitwise_and_(0xFFFFFFFF)
    out_NC.bitwise_left_shift_(at.shift).bitwise_or_(following.bitwise_right_shift_(32 - at.shift))
    if at.width < 64:
        out_NC.bitwise_right_shift_(64 - at.width).bitwise_and_((1 << at.width) - 1)


def _unpack(data_NB: torch.Tensor, at: _Positions, out_NC: torch.Tensor | None = None) -> torch.Tensor:
    """Extracts the values of a part, (N, C) int64; C ≥ 1."""
    count = at.window.shape[0]
    if out_NC is None:
        out_NC = torch.empty((data_NB.shape[0], count), dtype=torch.int64, device=data_NB.device)
    if at.width == 16:
        # Vocabularies of 32,769 … 65,536 ids are common, and working on byte boundaries takes half the time.
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
        (N, count) int64; 64-bit values are in two's complement.
    """
    if count == 0:
        return torch.empty((data_NB.shape[0], 0), dtype=torch.int64, device=data_NB.device)
    return _unpack(data_NB, _stream_positions(width, count, data_NB.device))


def _floats(data_NB: torch.Tensor, name: str) -> torch.Tensor:
    """Reads bytes as little-endian floats: (N, B) uint8 → (N, C)."""
    if data_NB.shape[1] == 0:
        return torch.zeros(data_NB.shape, dtype=_DTYPES[name], device=data_NB.device)
    # Copying aligns them, whatever their offset in the row.
    return data_NB.clone(memory_format=torch.contiguous_format).view(_DTYPES[name])


def _polynomial(coefficients_Nm: torch.Tensor, terms_mn: torch.Tensor) -> torch.Tensor:
    """Σ coefficient · term, (N, n), in term order with each product and sum rounded, as in the native decoder."""
    shape, kind = (coefficients_Nm.shape[0], terms_mn.shape[1]), terms_mn.dtype
    if terms_mn.shape[0] == 0:
        return torch.zeros(shape, dtype=kind, device=terms_mn.device)
    coefficients_Nm = coefficients_Nm.to(kind)
    total_Nn = coefficients_Nm[:, :1] * terms_mn[0]
    product_Nn = torch.empty_like(total_Nn)
    for term in range(1, terms_mn.shape[0]):
        # In two steps, since a fused multiply-add would round only once.
        torch.mul(coefficients_Nm[:, term : term + 1], terms_mn[term], out=product_Nn)
        total_Nn.add_(product_Nn)
    return total_Nn


def _dequantize(codes_NC: torch.Tensor, bits: int, scale_N1: torch.Tensor) -> torch.Tensor:
    """The float32 residuals of a bin's codes. Overwrites the codes."""
    if bits == 1:
        centred = codes_NC.mul_(2).sub_(1)
    elif bits == 64:
        centred = codes_NC.bitwise_xor_(torch.iinfo(torch.int64).min)  # subtracts 2⁶³ without overflow
    else:
        centred = codes_NC.sub_(1 << (bits - 1))
    return centred.float().mul_(scale_N1)


class _Constants(NamedTuple):
    """What a configuration needs on a device: the terms (m, n) and the positions of the ids and of each bin's codes."""

    terms_mn: torch.Tensor
    ids: _Positions
    bins: tuple[_Positions, ...]


class TorchDecoder:
    """Decodes rows of one configuration, on the devices for which `prepare` was called.

    Args:
        config: the codec's configuration.
        terms_mn: (m, n) float64, the terms evaluated at the approximated ranks, from the native code.
        id_bits: bits per id.
        published_rounding: round wherever the published decoder does (version 2, FORMAT.md §2.4).
    """

    def __init__(
        self, config: FixedConfig, terms_mn: npt.NDArray[np.float64], id_bits: int, published_rounding: bool
    ) -> None:
        self._config = config
        self._published_rounding = published_rounding
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
            ids (..., k) int64 and logprobs (..., k) float32, on the data's device; `out` if it was passed.

        Raises:
            InputError: `out` has the wrong shapes, dtypes or device.
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
            if not torch.compiler.is_compiling():
                _check_apart(ids, logprobs, data)
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
        """Moves the constants for decoding to a device, if they are not there yet."""
        if device in self._on_device:
            return
        config = self._config
        # Tensors created in inference mode cannot be used everywhere outside it.
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
        """Decodes the values, which come first, and returns their size in bytes per row."""
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
        exact_dtype, term_dtype = _DTYPES[config.exact_dtype], _DTYPES[config.term_dtype]
        if self._published_rounding:
            values_Nn = values_Nn.to(term_dtype).to(torch.promote_types(term_dtype, exact_dtype))
        first = 0
        for bin_, positions in zip(config.residual_bins, constants.bins, strict=True):
            scale_N1 = _floats(take(_DTYPES[bin_.scale_dtype].itemsize), bin_.scale_dtype).float()
            codes = take(-(-bin_.num_elements * bin_.element_bits // 8))
            residuals = _dequantize(_unpack(codes, positions), bin_.element_bits, scale_N1)
            if self._published_rounding:
                residuals = residuals.to(exact_dtype)
            values_Nn[:, first : first + bin_.num_elements].add_(residuals)
            first += bin_.num_elements
        # Running sums are in float64 and rounded only at the end (FORMAT.md §2.3).
        sequence_Nk = torch.empty_like(logprobs_Nk, dtype=torch.float64) if config.delta_encoding else logprobs_Nk
        sequence_Nk[:, : config.exact_k].copy_(exact)
        sequence_Nk[:, config.exact_k :].copy_(values_Nn)
        if config.delta_encoding and self._published_rounding:
            logprobs_Nk.copy_(sequence_Nk.float().double().cumsum_(1).float().to(exact_dtype))
        elif config.delta_encoding:
            logprobs_Nk.copy_(sequence_Nk.cumsum_(1))
        return at

    def _legacy(
        self,
        data_NB: torch.Tensor,
        config: LegacyLogitCompressionConfig,
        constants: _Constants,
        logprobs_Nk: torch.Tensor,
    ) -> int:
        """Like `_quantized`, for the legacy format."""
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


def _check_apart(ids: torch.Tensor, logprobs: torch.Tensor, data: torch.Tensor) -> None:
    """Refuses outputs whose memory overlaps with each other's or with the contiguous part of `data`."""

    def ends(tensor: torch.Tensor) -> tuple[int, int]:
        return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()

    for one, other in ((ids, logprobs), (ids, data), (logprobs, data)):
        (first, first_end), (second, second_end) = ends(one), ends(other)
        if first < second_end and second < first_end:
            raise InputError("out: ids, logprobs and data share memory; outputs need memory of their own")


_DECODERS: dict[tuple[str, str, int], TorchDecoder] = {}


# torch.compile runs this eagerly and treats its entry in _DECODERS as constant.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepared(format_name: str, config_json: str, version: int, device: torch.device) -> bool:
    key = (format_name, config_json, version)
    if key not in _DECODERS:
        native = _native.Codec(format_name, config_json)
        config: FixedConfig = codec_config(json.loads(config_json))  # type: ignore[assignment]
        _DECODERS[key] = TorchDecoder(config, native.terms(), native.id_bits, published_rounding=version == 2)
    _DECODERS[key].prepare(device)
    return True


def decoder_for(format_name: str, config_json: str, version: int, device: torch.device) -> TorchDecoder:
    """The decoder of a configuration, created once per process and prepared for a device.

    Args:
        format_name, config_json: as for the native codec.
        version: version of the format.
    """
    _prepared(format_name, config_json, version, device)
    return _DECODERS[format_name, config_json, version]


if torch.tensor([1], dtype=torch.int16).view(torch.uint8)[0] != 1:
    raise DistillKitError("decode_torch needs a little-endian machine; use Codec.decode")
