"""Rows of the fixed formats ↔ the columns of published datasets, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.codec.config import DistributionQuantizationConfig, FixedConfig, LegacyLogitCompressionConfig
from distillkit.errors import InputError

__all__ = ["columns_of_rows", "rows_of_columns"]


def columns_of_rows(config: FixedConfig, data: npt.NDArray[np.uint8], value_bytes: int) -> dict[str, npt.NDArray[Any]]:
    """The columns of a published dataset; see `Codec.to_published`."""
    values, ids = data[..., :value_bytes], data[..., value_bytes:]
    if isinstance(config, DistributionQuantizationConfig):
        return {"compressed_logprobs": values, "bytepacked_indices": ids}
    split = 2 * config.exact_k
    return {
        "packed_indices": np.ascontiguousarray(ids).view("<u8").astype(np.uint64, copy=False),
        "exact_values": np.ascontiguousarray(values[..., :split]).view("<f2").astype(np.float32),
        "coeffs": _from_stored(np.ascontiguousarray(values[..., split:]), _coefficient_dtype(config)),
    }


def rows_of_columns(
    config: FixedConfig, columns: Mapping[str, npt.NDArray[Any]], value_bytes: int, id_bytes: int
) -> npt.NDArray[np.uint8]:
    """Rows from the columns of a published dataset; see `Codec.from_published`."""
    if isinstance(config, DistributionQuantizationConfig):
        parts = [
            _bytes_column(columns, "compressed_logprobs", value_bytes),
            _bytes_column(columns, "bytepacked_indices", id_bytes),
        ]
    else:
        dtype = _coefficient_dtype(config)
        coefficients = (value_bytes - 2 * config.exact_k) // _SIZES[dtype]
        words = _column(columns, "packed_indices", id_bytes // 8)
        if words.dtype not in (np.int64, np.uint64):
            raise InputError(f"column packed_indices must be uint64 or int64, got {words.dtype}")
        parts = [
            _to_stored("exact_values", _column(columns, "exact_values", config.exact_k), "float16"),
            _to_stored("coeffs", _column(columns, "coeffs", coefficients), dtype),
            np.ascontiguousarray(words).astype("<u8").view(np.uint8),
        ]
    return np.concatenate(parts, axis=-1)


_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}


def _coefficient_dtype(config: LegacyLogitCompressionConfig) -> str:
    """Stored dtype of legacy coefficients. The published column is float32, so float64 coefficients were rounded."""
    return "float32" if config.term_dtype == "float64" else config.term_dtype


def _column(columns: Mapping[str, npt.NDArray[Any]], name: str, width: int) -> npt.NDArray[Any]:
    if name not in columns:
        raise InputError(f"column {name} is missing; found {', '.join(columns)}")
    column = np.asarray(columns[name])
    if column.ndim == 0 or column.shape[-1] != width:
        raise InputError(
            f"column {name} has {column.shape[-1] if column.ndim else 'no'} values per row, but this codec needs "
            f"{width}"
        )
    return column


def _bytes_column(columns: Mapping[str, npt.NDArray[Any]], name: str, width: int) -> npt.NDArray[np.uint8]:
    column = _column(columns, name, width)
    if column.dtype.kind not in "iu" or (column.size and not 0 <= int(column.min()) <= int(column.max()) <= 255):
        raise InputError(f"column {name} must be bytes, integers from 0 to 255; got {column.dtype}")
    return column.astype(np.uint8, copy=False)


def _to_stored(name: str, values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.uint8]:
    """Float values as little-endian bytes of `dtype`. Raises InputError if the conversion would change a value."""
    exact = np.ascontiguousarray(values, dtype="<f4")
    if dtype == "bfloat16":
        stored = (exact.view("<u4") >> 16).astype("<u2")
    else:
        with np.errstate(over="ignore"):
            stored = exact.astype({"float16": "<f2", "float32": "<f4"}[dtype])
    if not np.array_equal(_from_stored(stored.view(np.uint8), dtype), values, equal_nan=True):
        raise InputError(f"column {name} has values that cannot be represented in {dtype}, which this codec stores")
    return stored.view(np.uint8)


def _from_stored(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view({"float16": "<f2", "float32": "<f4"}[dtype]).astype(np.float32)
