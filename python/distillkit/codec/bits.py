"""Packs unsigned integers of 1–64 bits into bytes, most significant bit first (rust/codec/FORMAT.md §1)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit import _native
from distillkit.errors import InputError, TruncatedDataError

__all__ = ["pack", "packed_len", "unpack"]


def packed_len(count: int, width: int) -> int:
    """Number of bytes that `count` values of `width` bits take.

    Example:
        >>> packed_len(128, 17)
        272
    """
    return -(-count * width // 8)


def pack(values: npt.ArrayLike, width: int) -> npt.NDArray[np.uint8]:
    """Packs the last axis: (..., n) integers → (..., ceil(n·width / 8)) uint8. Padding bits are zero.

    64-bit values may also be passed as int64 bit patterns.

    Raises:
        InputError: width is not 1–64, the values are not integers, or one needs more than `width` bits.

    Example:
        >>> import numpy as np
        >>> pack(np.array([1, 2, 3]), 3)  # 001 010 011, then padding
        array([ 41, 128], dtype=uint8)
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.ndim == 0:
        raise InputError(f"values must be an integer array with at least one axis, got {array.dtype} {array.shape}")
    _check_width(width)
    if array.dtype.kind == "i" and width < 64 and array.size and array.min() < 0:
        raise InputError(f"value {array.min()} is negative and does not fit in {width} bits")
    rows = _rows(array.astype(np.uint64, copy=False))
    packed: npt.NDArray[np.uint8] = _native.pack_bits(rows, width)
    return packed.reshape(*array.shape[:-1], packed.shape[-1])


def unpack(data: npt.NDArray[np.uint8], width: int, count: int) -> npt.NDArray[np.uint64]:
    """Unpacks the last axis: (..., ceil(count·width / 8)) uint8 → (..., count) uint64.

    Raises:
        InputError: width is not 1–64, or data is not uint8.
        TruncatedDataError: the last axis does not have the length that `count` values need.
        CorruptDataError: a padding bit is set.

    Example:
        >>> import numpy as np
        >>> unpack(np.array([41, 128], dtype=np.uint8), 3, 3)
        array([1, 2, 3], dtype=uint64)
    """
    array: npt.NDArray[Any] = np.asarray(data)
    if array.dtype != np.uint8 or array.ndim == 0:
        raise InputError(f"data must be a uint8 array with at least one axis, got {array.dtype} {array.shape}")
    _check_width(width)
    if array.shape[-1] != packed_len(count, width):
        raise TruncatedDataError(
            f"{count} values of {width} bits need {packed_len(count, width)} bytes, found {array.shape[-1]}"
        )
    return _native.unpack_bits(_rows(array), width, count).reshape(*array.shape[:-1], count)


def _check_width(width: int) -> None:
    if not 1 <= width <= 64:
        raise InputError(f"bit width {width} is not between 1 and 64")


def _rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A C-contiguous 2-D array with the last axis as rows. Any axis may have size 0."""
    return np.ascontiguousarray(array).reshape(math.prod(array.shape[:-1]), array.shape[-1])
