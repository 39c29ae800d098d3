"""`Codec`: sparse teacher distributions ↔ bytes.

Shape legend: R rows (positions), k stored ids per row, V vocabulary size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distillkit import _native
from distillkit.codec.config import (
    CodecConfig,
    DistributionQuantizationConfig,
    LegacyLogitCompressionConfig,
    codec_config,
)
from distillkit.codec.topk import is_tensor, native_logits, sparse_from_logits
from distillkit.errors import CorruptDataError, InputError, TruncatedDataError, UnsupportedVersionError
from distillkit.types import Array, SparseLogprobs

if TYPE_CHECKING:
    import torch

__all__ = ["Codec"]

_VERSIONS = {"quantized": 2, "legacy": 1}
"""The latest version of each format that this release reads (rust/codec/FORMAT.md)."""
_PUBLISHED_ROUNDING = 2
"""The version of "quantized" whose bytes are decoded with the roundings of the published decoder."""
_CONFIGS = {"quantized": DistributionQuantizationConfig, "legacy": LegacyLogitCompressionConfig}


class Codec:
    """Encodes and decodes rows in one configuration.

    numpy in, numpy out; torch in, torch out on the same device. A row has the published layout: the bytes of the
    values, then the bytes of the ids.

    Args:
        config: a configuration, or a mapping that `codec_config` accepts.
        version: version of the format. Version 2 of "quantized" has the bytes of version 1, but they are decoded with
            every rounding of the published decoder; see `for_published`.

    Attributes:
        config: the configuration.
        format: "quantized" or "legacy".
        version: version of that format.
        k: stored ids per row.
        simd: the instruction set in use: "portable", "avx2", "avx512" or "neon" (`DISTILLKIT_SIMD` forces one).
        vocab_size: ids must be less than this.
        value_bytes, id_bytes, bytes_per_token: size of a row's values, of its ids, and of both together.
        warnings: settings that are valid but probably not intended.

    Raises:
        ConfigError: the configuration is invalid.
        UnsupportedVersionError: this release does not support that version of the format.

    Example:
        >>> import numpy as np
        >>> from distillkit.codec import Codec, preset
        >>> codec = Codec(preset("budget", vocab_size=1000))
        >>> codec.k, codec.bytes_per_token, codec.value_bytes, codec.id_bytes
        (50, 77, 14, 63)
        >>> logits = np.random.default_rng(0).standard_normal((4, 1000), dtype=np.float32)
        >>> data = codec.encode_logits(logits)
        >>> data.shape, data.dtype
        ((4, 77), dtype('uint8'))
        >>> ids, logprobs = codec.decode(data)
        >>> ids.shape, ids.dtype, logprobs.dtype
        ((4, 50), dtype('int64'), dtype('float32'))
        >>> bool((ids[:, 0] == logits.argmax(-1)).all())
        True
    """

    def __init__(self, config: CodecConfig | Mapping[str, Any], *, version: int = 1) -> None:
        self.config: CodecConfig = codec_config(config)
        self.format: str = self.config.format
        _check_version(self.format, version)
        self.version: int = version
        self._config_json = self.config.model_dump_json()
        self._native = _native.Codec(self.format, self._config_json, version == _PUBLISHED_ROUNDING)
        self.k: int = self._native.k
        self.simd: str = self._native.backend
        self.vocab_size: int = self._native.vocab_size
        self.value_bytes: int = self._native.value_bytes
        self.id_bytes: int = self._native.id_bytes
        self.bytes_per_token: int = self.value_bytes + self.id_bytes
        self.warnings: list[str] = self._native.warnings

    def __repr__(self) -> str:
        return f"Codec({self.config!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Codec.from_dict, (self.to_dict(),)

    @staticmethod
    def for_published(config: CodecConfig | Mapping[str, Any]) -> Codec:
        """The codec for bytes that the published encoder wrote.

        It took residuals against its own polynomial, rounded to `term_dtype`. If that has 16 bits, only a decoder with
        the same roundings restores the values; in all other configurations ours is at least as exact as the published.

        Raises:
            ConfigError: the configuration is invalid.

        Example:
            >>> from distillkit.codec import Codec
            >>> bins = [{"scale_dtype": "float32", "element_bits": 8, "num_elements": 4}]
            >>> config = {"d": 1000, "k": 8, "exact_k": 4, "polynomial_terms": [0, 1], "residual_bins": bins}
            >>> [Codec.for_published({**config, "term_dtype": dtype}).version for dtype in ("float32", "float16")]
            [1, 2]
        """
        parsed = codec_config(config)
        rounded = (
            isinstance(parsed, DistributionQuantizationConfig)
            and bool(parsed.residual_bins)
            and bool(parsed.polynomial_terms)
            and parsed.term_dtype in ("float16", "bfloat16")
        )
        return Codec(parsed, version=_PUBLISHED_ROUNDING if rounded else 1)

    def to_dict(self) -> dict[str, Any]:
        """Format, version and configuration as a JSON-serialisable mapping, as stored in a shard's header."""
        return {"format": self.format, "version": self.version, "config": json.loads(self._native.config_json)}

    @staticmethod
    def from_dict(description: Mapping[str, Any]) -> Codec:
        """Recreates a codec from the result of `to_dict`.

        Raises:
            UnsupportedVersionError: this release does not support the format or its version.
            CorruptDataError: the mapping does not describe a codec.
            ConfigError: its configuration is invalid.

        Example:
            >>> from distillkit.codec import Codec, preset
            >>> codec = Codec(preset("recommended", vocab_size=151_936))
            >>> Codec.from_dict(codec.to_dict()) == codec
            True
        """
        name, version, config = (description.get(key) for key in ("format", "version", "config"))
        if not isinstance(name, str) or not isinstance(version, int) or not isinstance(config, Mapping):
            raise CorruptDataError(f"a codec description needs format, version and config; found {dict(description)!r}")
        _check_version(name, version)
        return Codec(_CONFIGS[name](**config), version=version)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def encode(self, ids: Array, logprobs: Array, *, out: Array | None = None) -> Any:
        """Encodes rows.

        Args:
            ids: (..., k) integers, distinct within a row, each below `vocab_size`.
            logprobs: (..., k) floats, log-probabilities under the full softmax. Rows that are not in descending order
                are sorted (stable).
            out: C-contiguous (..., bytes_per_token) uint8 to write into, numpy or torch like the inputs, on the CPU.

        Returns:
            (..., bytes_per_token) uint8; `out` itself if it was passed.

        Raises:
            InputError: wrong shapes or dtypes, values that are not finite or not log-probabilities, or ids that are
                repeated or out of range.
        """
        if is_tensor(ids) and is_tensor(logprobs):
            return self._encode_tensors(ids, logprobs, out)
        if is_tensor(ids) or is_tensor(logprobs):
            raise InputError(
                f"ids is a {type(ids).__name__} and logprobs a {type(logprobs).__name__}: pass two numpy arrays or "
                "two torch tensors"
            )
        ids, logprobs = np.asarray(ids), np.asarray(logprobs)
        if ids.dtype.kind not in "iu" or logprobs.dtype.kind != "f":
            raise InputError(f"ids must be integers and logprobs floats, got {ids.dtype} and {logprobs.dtype}")
        if ids.shape != logprobs.shape or ids.ndim == 0 or ids.shape[-1] != self.k:
            raise InputError(
                f"ids and logprobs must both have shape (..., k = {self.k}), got {ids.shape} and {logprobs.shape}"
            )
        data = _output("out", out, (*ids.shape[:-1], self.bytes_per_token), np.uint8)
        # A float64 outside float32's range becomes infinite here; the native encoder then rejects its row.
        with np.errstate(over="ignore"):
            self._native.encode(
                np.require(ids, np.int64, ["C", "A"]).reshape(-1, self.k),
                np.require(logprobs, np.float32, ["C", "A"]).reshape(-1, self.k),
                data.reshape(-1, self.bytes_per_token),
            )
        return data

    def _encode_tensors(self, ids: torch.Tensor, logprobs: torch.Tensor, out: Any) -> torch.Tensor:
        import torch

        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not logprobs.is_floating_point():
            raise InputError(f"ids must be integers and logprobs floats, got {ids.dtype} and {logprobs.dtype}")
        # numpy has no bfloat16; float32 holds its values exactly.
        data = self.encode(ids.detach().cpu().numpy(), logprobs.detach().float().cpu().numpy(), out=_as_array(out))
        return torch.from_numpy(data).to(ids.device) if out is None else out

    def decode(self, data: Any, *, out: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
        """Decodes rows, in rank order.

        Args:
            data: (..., bytes_per_token) uint8.
            out: C-contiguous ids (..., k) int64 and logprobs (..., k) float32 to write into, numpy or torch like
                `data`. Their contents are unspecified after an error.

        Returns:
            ids (..., k) int64 and logprobs (..., k) float32; those of `out` if it was passed.

        Raises:
            InputError: `data` is not uint8, or `out` does not fit.
            TruncatedDataError: the last axis has the wrong length.
            CorruptDataError: ids outside the vocabulary, values that are not finite, or unused bits that are set.
        """
        if is_tensor(data):
            if data.device.type != "cpu":
                return self.decode_torch(data, out=out)
            import torch

            arrays = self.decode(data.numpy(), out=None if out is None else (_as_array(out[0]), _as_array(out[1])))
            return (torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])) if out is None else out
        data = np.asarray(data)
        self._check_row_bytes(data)
        shape = (*data.shape[:-1], self.k)
        ids = _output("out[0]", None if out is None else out[0], shape, np.int64)
        logprobs = _output("out[1]", None if out is None else out[1], shape, np.float32)
        rows = np.ascontiguousarray(data).reshape(-1, self.bytes_per_token)
        self._native.decode(rows, ids.reshape(-1, self.k), logprobs.reshape(-1, self.k))
        return ids, logprobs

    def decode_torch(
        self, data: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes rows with torch operations, on the tensor's own device. Works in inference mode and when compiled.

        Ids and exact values always equal those of `decode` bit for bit. The other values do too where each product and
        sum is rounded separately, as on a CPU. With fused multiply-add they may differ by up to
        m · 2⁻²³ · Σ |coefficient · term| (m terms); with another summation order (`delta_encoding`), by the last bit of
        a float32. The contents are not validated, since rows come from documents that already were.

        Temporary memory: a few thousand rows on a CPU, about 12 bytes per value (rows × k) on other devices.

        Args:
            data: (..., bytes_per_token) uint8.
            out: contiguous tensors to fill instead of new ones: ids (..., k) int64 and logprobs (..., k) float32.

        Returns:
            ids (..., k) int64 and logprobs (..., k) float32, on the tensor's device.

        Raises:
            InputError: `data` is not uint8, or `out` does not fit.
            TruncatedDataError: the last axis has the wrong length.
        """
        from distillkit.codec.torch_decode import decoder_for

        self._check_row_bytes(data)
        return decoder_for(self.format, self._config_json, self.version, data.device)(data, out)

    def _check_row_bytes(self, data: Any) -> None:
        if str(data.dtype).removeprefix("torch.") != "uint8":
            raise InputError(f"data must be uint8, got {data.dtype}")
        if data.ndim == 0 or data.shape[-1] != self.bytes_per_token:
            raise TruncatedDataError(
                f"a row of this codec has {self.bytes_per_token} bytes, found shape {tuple(data.shape)}"
            )

    def encode_logits(self, logits: Array, *, out: Array | None = None) -> Any:
        """Top-k, log-softmax and encoding of dense logits in a single pass.

        Args:
            logits: (..., V) float32 or float16 array, or float32, bfloat16 or float16 tensor, with V = `vocab_size`.
            out: C-contiguous (..., bytes_per_token) uint8 to write into, numpy or torch like the logits, on the CPU.

        Returns:
            (..., bytes_per_token) uint8, numpy or torch like the logits and on their device; `out` if it was passed.

        Raises:
            InputError: wrong V or dtype, NaN or +∞, or fewer than k finite logits in a row.
        """
        if logits.ndim == 0 or logits.shape[-1] != self.vocab_size:
            raise InputError(
                f"logits of shape {tuple(logits.shape)} must have the codec's vocabulary size, {self.vocab_size}, as "
                "last axis"
            )
        if is_tensor(logits) and logits.device.type != "cpu":
            sparse = sparse_from_logits(logits, self.k)
            return self.encode(sparse.ids, sparse.logprobs, out=out)
        rows, bfloat16 = native_logits(logits)
        data = _output("out", _as_array(out), (*logits.shape[:-1], self.bytes_per_token), np.uint8)
        self._native.encode_logits(rows, bfloat16, data.reshape(-1, self.bytes_per_token))
        if is_tensor(logits) and out is None:
            import torch

            return torch.from_numpy(data)
        return data if out is None else out

    # -- documents -----------------------------------------------------------------------------------------------------

    def encode_document(self, rows: SparseLogprobs) -> bytes:
        """Encodes a document's R rows, given as (R, k) ids and log-probabilities.

        Raises:
            InputError: as for `encode`.
        """
        data = self.encode(rows.ids, rows.logprobs)
        return bytes((data.cpu().numpy() if is_tensor(data) else data).tobytes())

    def decode_document(self, data: bytes | memoryview, rows: int) -> SparseLogprobs:
        """Decodes the R = `rows` rows of a document into numpy (R, k) ids and log-probabilities.

        Raises:
            TruncatedDataError: `data` does not have the size of `rows` rows.
            CorruptDataError: as for `decode`.
        """
        return SparseLogprobs(*self.decode(self.document_rows(data, rows)))

    def document_rows(self, data: bytes | memoryview, rows: int) -> npt.NDArray[np.uint8]:
        """A document's bytes as (rows, bytes_per_token) uint8, without a copy.

        Raises:
            TruncatedDataError: `data` does not have the size of `rows` rows.
        """
        if len(data) != rows * self.bytes_per_token:
            raise TruncatedDataError(
                f"{rows} rows of {self.bytes_per_token} bytes need {rows * self.bytes_per_token} bytes, "
                f"found {len(data)}"
            )
        return np.frombuffer(data, dtype=np.uint8).reshape(rows, self.bytes_per_token)

    # -- published columns ---------------------------------------------------------------------------------------------

    def to_published(self, data: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """Converts rows to the columns of a published dataset.

        Args:
            data: (R, bytes_per_token) uint8.

        Returns:
            quantized: `compressed_logprobs` (R, value_bytes) and `bytepacked_indices` (R, id_bytes) uint8. legacy:
            `packed_indices` (R, words) uint64, `exact_values` (R, exact_k) and `coeffs` (R, coefficients) float32.

        Raises:
            InputError, TruncatedDataError: as for `decode`.

        Example:
            >>> import numpy as np
            >>> from distillkit.codec import Codec, preset
            >>> codec = Codec(preset("recommended", vocab_size=1000))
            >>> data = codec.encode_logits(np.zeros((2, 1000), np.float32))
            >>> columns = codec.to_published(data)
            >>> {name: column.shape for name, column in columns.items()}
            {'compressed_logprobs': (2, 56), 'bytepacked_indices': (2, 160)}
            >>> bool((codec.from_published(columns) == data).all())
            True
        """
        self._check_row_bytes(data)
        values, ids = data[..., : self.value_bytes], data[..., self.value_bytes :]
        if isinstance(self.config, DistributionQuantizationConfig):
            return {"compressed_logprobs": values, "bytepacked_indices": ids}
        split = 2 * self.config.exact_k
        return {
            "packed_indices": np.ascontiguousarray(ids).view("<u8").astype(np.uint64, copy=False),
            "exact_values": np.ascontiguousarray(values[..., :split]).view("<f2").astype(np.float32),
            "coeffs": _from_stored(np.ascontiguousarray(values[..., split:]), _coefficient_dtype(self.config)),
        }

    def from_published(self, columns: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
        """Converts the columns of a published dataset to rows: the bit-exact inverse of `to_published`.

        `packed_indices` may also be int64 (the same words, signed); the other columns may have any float type that
        represents the stored values.

        Raises:
            InputError: a column is missing, has the wrong shape, or has values that the format cannot store exactly.
        """
        if isinstance(self.config, DistributionQuantizationConfig):
            parts = [
                _bytes_column(columns, "compressed_logprobs", self.value_bytes),
                _bytes_column(columns, "bytepacked_indices", self.id_bytes),
            ]
        else:
            coefficients = self._native.terms().shape[0]
            words = _column(columns, "packed_indices", self._native.words)
            if words.dtype not in (np.int64, np.uint64):
                raise InputError(f"column packed_indices must be uint64 or int64, got {words.dtype}")
            parts = [
                _to_stored("exact_values", _column(columns, "exact_values", self.config.exact_k), "float16"),
                _to_stored("coeffs", _column(columns, "coeffs", coefficients), _coefficient_dtype(self.config)),
                np.ascontiguousarray(words).astype("<u8").view(np.uint8),
            ]
        return np.concatenate(parts, axis=-1)


def _check_version(name: str, version: int) -> None:
    if name not in _VERSIONS or version > _VERSIONS[name] or version < 1:
        known = ", ".join(f"{known} up to version {newest}" for known, newest in _VERSIONS.items())
        raise UnsupportedVersionError(
            f"the data is in codec format '{name}' version {version}; this release reads {known}; update distillkit"
        )


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


def _as_array(out: Any) -> Any:
    """A numpy view of a CPU tensor; anything else unchanged."""
    return out.numpy() if is_tensor(out) and out.device.type == "cpu" else out


def _output(name: str, out: Any, shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """`out` after checking it, or a new array."""
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray):
        raise InputError(f"{name} is a {type(out).__name__}; it must be numpy or torch like the inputs, on the CPU")
    if out.shape != shape or out.dtype != dtype:
        raise InputError(f"{name} must be {np.dtype(dtype)} of shape {shape}, got {out.dtype} of shape {out.shape}")
    if not (out.flags.c_contiguous and out.flags.aligned and out.flags.writeable):
        raise InputError(f"{name} must be C-contiguous, aligned and writeable")
    return out
