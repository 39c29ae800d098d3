"""`Codec`: sparse teacher distributions ↔ bytes.

Shape legend: R rows (positions), k stored ids per row (at most, in the compact format), V vocabulary size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distillkit import _native
from distillkit.codec.config import (
    CodecConfig,
    CompactConfig,
    DistributionQuantizationConfig,
    FixedConfig,
    LearnedConfig,
    LegacyLogitCompressionConfig,
    SampledConfig,
    codec_config,
)
from distillkit.codec.presets import expected_bytes
from distillkit.codec.prior import Prior
from distillkit.codec.published_columns import columns_of_rows, rows_of_columns
from distillkit.codec.topk import is_tensor, native_logits, sparse_from_logits
from distillkit.errors import ConfigError, CorruptDataError, InputError, TruncatedDataError, UnsupportedVersionError
from distillkit.types import Array, Draws, SparseLogprobs

if TYPE_CHECKING:
    import torch

__all__ = ["Codec"]

_VERSIONS = {"quantized": 2, "legacy": 1, "compact": 1, "sampled": 1}
"""The latest version of each format that this release reads (rust/codec/FORMAT.md)."""
_PUBLISHED_ROUNDING = 2
"""The version of "quantized" whose bytes are decoded with the roundings of the published decoder."""
_CONFIGS: dict[str, type[CodecConfig]] = {
    "quantized": DistributionQuantizationConfig,
    "legacy": LegacyLogitCompressionConfig,
    "compact": CompactConfig,
    "sampled": SampledConfig,
}


class Codec:
    """Encodes and decodes rows in one configuration.

    Every format encodes a document at a time: `encode_document`, `decode_document`, `join_documents` and `sizes`. In
    the fixed formats each row also has the same number of bytes, so rows can be encoded, decoded and selected by
    themselves: numpy in, numpy out; torch in, torch out on the same device. Such a row has the published layout: the
    bytes of the values, then the bytes of the ids. With the formats compact and sampled, everything about single rows
    raises an InputError that says what to use instead.

    Args:
        config: a configuration, or a mapping that `codec_config` accepts.
        version: version of the format. Version 2 of "quantized" has the bytes of version 1, but they are decoded with
            every rounding of the published decoder; see `for_published`.
        prior: what was learned from other rows of the teacher, for the formats compact and sampled; None for the
            built-in prior. If the configuration names a prior, it must be this one.

    Attributes:
        config: the configuration.
        format: "quantized", "legacy", "compact" or "sampled".
        version: version of that format.
        k: stored ids per row. With the format sampled, and an adaptive compact configuration (`threshold` or `mass`), a
            row may have fewer: the other places of decoded rows repeat its first id, with a log-probability of −inf.
        prior: the prior, if the format has one and it has been learned.
        simd: the instruction set in use: "portable", "avx2", "avx512" or "neon" (`DISTILLKIT_SIMD` forces one).
        vocab_size: ids must be less than this.
        warnings: settings that are valid but probably not intended.

    Raises:
        ConfigError: the configuration is invalid, or its prior was not passed.
        CorruptDataError: the prior is another than the configuration names, or damaged.
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

    def __init__(
        self, config: CodecConfig | Mapping[str, Any], *, version: int = 1, prior: Prior | None = None
    ) -> None:
        self.config: CodecConfig = codec_config(config)
        self.format: str = self.config.format
        _check_version(self.format, version)
        self.version: int = version
        self.prior: Prior | None = prior
        self._config_json = self.config.model_dump_json()
        native: _native.Codec | _native.CompactCodec | _native.SampledCodec
        if isinstance(self.config, (CompactConfig, SampledConfig)):
            self.config = _with_prior(self.config, prior)
            self._config_json = self.config.model_dump_json()
            native = self._by_document = _learned_codec(type(self.config), self._config_json, prior)
        elif prior is not None:
            raise ConfigError(f"the format {self.format} has no prior, but {prior.source} was passed")
        else:
            native = self._native = _native.Codec(self.format, self._config_json, version == _PUBLISHED_ROUNDING)
        self.k: int = native.k
        self.simd: str = native.backend
        self.vocab_size: int = native.vocab_size
        self.warnings: list[str] = native.warnings
        self._config_json_filled = native.config_json

    @property
    def is_fixed(self) -> bool:
        """Whether each row has the same number of bytes."""
        return not isinstance(self.config, LearnedConfig)

    @property
    def draws(self) -> Draws | None:
        """How the teacher was drawn from, if the format is sampled."""
        config = self.config
        return Draws(config.draws, config.temperature) if isinstance(config, SampledConfig) else None

    @property
    def varies(self) -> bool:
        """Whether rows may have fewer than k ids."""
        return self.draws is not None or (isinstance(self.config, CompactConfig) and self.config.adaptive)

    @property
    def fixed_config(self) -> FixedConfig:
        """The configuration; only of fixed formats."""
        self._fixed("fixed_config", _CONVERT_FIRST)
        return self.config  # type: ignore[return-value]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a row, ids and values; only of fixed formats."""
        return self.value_bytes + self.id_bytes

    @property
    def expected_bytes_per_token(self) -> int:
        """Bytes of a row in the fixed formats; in the others, about how many it takes (`expected_bytes`)."""
        if isinstance(self.config, (CompactConfig, SampledConfig)):
            return math.ceil(expected_bytes(self.config))
        return self.bytes_per_token

    @property
    def value_bytes(self) -> int:
        """Bytes of a row's values; only of fixed formats."""
        return self._fixed("value_bytes", _SIZES_DIFFER).value_bytes

    @property
    def id_bytes(self) -> int:
        """Bytes of a row's ids; only of fixed formats."""
        return self._fixed("id_bytes", _SIZES_DIFFER).id_bytes

    @property
    def exact_k(self) -> int:
        """Leading ranks whose values are stored one by one, so that they are in order and sum to at most 1."""
        return self.fixed_config.exact_k if self.is_fixed else self.k

    def _fixed(self, name: str, instead: str) -> _native.Codec:
        """The native codec of a fixed format.

        Raises:
            InputError: the format is not a fixed one; says what to do instead of using `name`.
        """
        if not self.is_fixed:
            raise InputError(f"Codec.{name}: rows of the format {self.format} have no fixed number of bytes: {instead}")
        return self._native

    def __repr__(self) -> str:
        return f"Codec({self.config!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Codec.from_dict, (self.to_dict(), self.prior)

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
        return {"format": self.format, "version": self.version, "config": json.loads(self._config_json_filled)}

    @staticmethod
    def from_dict(description: Mapping[str, Any], prior: Prior | None = None) -> Codec:
        """Recreates a codec from the result of `to_dict` and, if that names one, its prior.

        Raises:
            UnsupportedVersionError: this release does not support the format or its version.
            CorruptDataError: the mapping does not describe a codec, or the prior is another or damaged.
            ConfigError: its configuration is invalid, or its prior was not passed.

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
        return Codec(_CONFIGS[name](**config), version=version, prior=prior)

    # -- rows, of fixed formats -----------------------------------------------------------------------------------

    def encode(self, ids: Array, logprobs: Array, *, out: Array | None = None) -> Any:
        """Encodes rows, in a fixed format.

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
        native = self._fixed("encode", "encode a document with encode_document")
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
            native.encode(
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
        """Decodes rows of a fixed format, in rank order.

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
        native = self._fixed("decode", "decode a document with decode_document")
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
        native.decode(rows, ids.reshape(-1, self.k), logprobs.reshape(-1, self.k))
        return ids, logprobs

    def decode_torch(
        self, data: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes rows of a fixed format with torch operations, on the tensor's own device.

        Works in inference mode and when compiled.

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

        self._fixed(
            "decode_torch",
            "decode a document with decode_document, on the CPU, as training does in the workers of its loader "
            "(training_args.dataloader_num_workers)",
        )
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
        """Top-k, log-softmax and encoding of dense logits in a single pass, in a fixed format.

        Args:
            logits: (..., V) float32 or float16 array, or float32, bfloat16 or float16 tensor, with V = `vocab_size`.
            out: C-contiguous (..., bytes_per_token) uint8 to write into, numpy or torch like the logits, on the CPU.

        Returns:
            (..., bytes_per_token) uint8, numpy or torch like the logits and on their device; `out` if it was passed.

        Raises:
            InputError: wrong V or dtype, NaN or +∞, or fewer than k finite logits in a row.
        """
        native = self._fixed("encode_logits", "encode a document with encode_document(sparse_from_logits(logits, k))")
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
        native.encode_logits(rows, bfloat16, data.reshape(-1, self.bytes_per_token))
        if is_tensor(logits) and out is None:
            import torch

            return torch.from_numpy(data)
        return data if out is None else out

    # -- documents -----------------------------------------------------------------------------------------------------

    def encode_document(self, rows: SparseLogprobs) -> bytes:
        """Encodes a document's R rows.

        Args:
            rows: (R, k) ids and log-probabilities under the full softmax, most probable first. In the compact format,
                they may have more ids than the codec's k, of which the first k are stored, and may end in places
                without an id, whose log-probability is −inf. In the format sampled, they are shares of the draws, as
                `draws_from_logits` returns them.

        Raises:
            InputError: wrong shapes, values that are not log-probabilities, or ids that are repeated or out of range;
                in the format sampled, rows that were not drawn as the configuration says.
        """
        if rows.draws != self.draws:
            raise InputError(_not_drawn(rows.draws, self.draws))
        if self.is_fixed:
            data = self.encode(rows.ids, rows.logprobs)
            return bytes((data.cpu().numpy() if is_tensor(data) else data).tobytes())
        ids, logprobs = (part.detach().cpu().numpy() if is_tensor(part) else part for part in (rows.ids, rows.logprobs))
        if ids.ndim != 2 or rows.k < self.k:
            raise InputError(f"a document's rows must have the shape (R, at least k = {self.k}), got {ids.shape}")
        return self._by_document.encode_document(
            np.require(ids, np.int64, ["C", "A"]), np.require(logprobs, np.float32, ["C", "A"])
        )

    def decode_document(
        self, data: bytes | memoryview, rows: int, *, out: tuple[Array, Array] | None = None
    ) -> SparseLogprobs:
        """Decodes the R = `rows` rows of a document.

        Args:
            out: C-contiguous numpy ids (R, k) int64 and logprobs (R, k) float32 to write into.

        Returns:
            numpy (R, k) ids and log-probabilities, in rank order; places without an id have the row's first id and a
            log-probability of −inf.

        Raises:
            TruncatedDataError: `data` does not have the size of `rows` rows.
            CorruptDataError: ids outside the vocabulary, values that are not finite, or damaged bytes.
        """
        if self.is_fixed:
            return SparseLogprobs(*self.decode(self.document_rows(data, rows), out=out))
        self.check_document(data, rows)
        ids = _output("out[0]", None if out is None else out[0], (rows, self.k), np.int64)
        logprobs = _output("out[1]", None if out is None else out[1], (rows, self.k), np.float32)
        self._by_document.decode_document(np.frombuffer(data, np.uint8), ids, logprobs)
        return SparseLogprobs(ids, logprobs, self.draws)

    def check_document(self, data: bytes | memoryview, rows: int) -> None:
        """Refuses bytes that cannot be a document of so many rows. Nothing is decoded, and no memory taken.

        Raises:
            CorruptDataError: says what was expected.
        """
        if not self.is_fixed:
            self._by_document.check(np.frombuffer(data, np.uint8), rows)
        elif len(data) != rows * self.bytes_per_token:
            raise TruncatedDataError(
                f"{rows} rows of {self.bytes_per_token} bytes need {rows * self.bytes_per_token} bytes, "
                f"found {len(data)}"
            )

    def document_rows(self, data: bytes | memoryview, rows: int) -> npt.NDArray[np.uint8]:
        """A document's bytes as (rows, bytes_per_token) uint8, without a copy; only of fixed formats.

        Raises:
            TruncatedDataError: `data` does not have the size of `rows` rows.
        """
        self._fixed("document_rows", "decode a document with decode_document and select rows of the result")
        self.check_document(data, rows)
        return np.frombuffer(data, dtype=np.uint8).reshape(rows, self.bytes_per_token)

    def join_documents(self, parts: Sequence[tuple[bytes | memoryview, int, slice]]) -> bytes:
        """Rows of several documents as one document, each of them unchanged.

        Args:
            parts: the bytes of a document, its number of rows, and which of them to take.

        Raises:
            TruncatedDataError, CorruptDataError: as for `decode_document`.

        Example:
            >>> import numpy as np
            >>> from distillkit.codec import Codec, preset
            >>> codec = Codec(preset("budget", vocab_size=1000))
            >>> data = codec.encode_logits(np.eye(4, 1000, dtype=np.float32)).tobytes()
            >>> joined = codec.join_documents([(data, 4, slice(2, 4)), (data, 4, slice(0, 1))])
            >>> codec.decode_document(joined, 3).ids[:, 0].tolist()
            [2, 3, 0]
        """
        if self.is_fixed:
            return b"".join(self.document_rows(data, rows)[part].tobytes() for data, rows, part in parts)
        return self._by_document.join(
            [(np.frombuffer(data, np.uint8), rows, *part.indices(rows)[:2]) for data, rows, part in parts]
        )

    def sizes(self, data: bytes | memoryview, rows: int) -> dict[str, float]:
        """What takes how many bytes of a document: `ids` and `values` (in the format sampled, the counts of draws); in
        the formats compact and sampled also `head` (what each row begins with) and `framing` (checksums and lengths).

        Raises:
            TruncatedDataError, CorruptDataError: as for `decode_document`.
        """
        if self.is_fixed:
            self.check_document(data, rows)
            return {"ids": float(rows * self.id_bytes), "values": float(rows * self.value_bytes)}
        return self._by_document.sizes(np.frombuffer(data, np.uint8), rows)

    def row_bits(self, data: bytes | memoryview, rows: int) -> npt.NDArray[np.float32]:
        """(R,) how many bits each row of a document takes, without the framing of the document.

        Raises:
            TruncatedDataError, CorruptDataError: as for `decode_document`.
        """
        if self.is_fixed:
            self.check_document(data, rows)
            return np.full(rows, 8 * self.bytes_per_token, np.float32)
        return self._by_document.row_bits(np.frombuffer(data, np.uint8), rows)

    # -- published columns ---------------------------------------------------------------------------------------------

    def to_published(self, data: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """Converts rows of a fixed format to the columns of a published dataset.

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
        self._fixed("to_published", _CONVERT_FIRST)
        self._check_row_bytes(data)
        return columns_of_rows(self.fixed_config, data, self.value_bytes)

    def from_published(self, columns: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
        """Converts the columns of a published dataset to rows: the bit-exact inverse of `to_published`.

        `packed_indices` may also be int64 (the same words, signed); the other columns may have any float type that
        represents the stored values.

        Raises:
            InputError: a column is missing, has the wrong shape, or has values that the format cannot store exactly.
        """
        self._fixed("from_published", _CONVERT_FIRST)
        return rows_of_columns(self.fixed_config, columns, self.value_bytes, self.id_bytes)


_SIZES_DIFFER = "Codec.sizes says what a document takes"
_CONVERT_FIRST = (
    "published datasets are in a fixed format; convert to one with `distillkit-codec convert SOURCE DESTINATION "
    "--preset recommended`"
)


def _not_drawn(found: Draws | None, expected: Draws | None) -> str:
    """Why rows do not fit a codec."""

    def named(draws: Draws | None) -> str:
        if draws is None:
            return "log-probabilities of a distribution"
        return f"shares of {draws.number} draws at temperature {draws.temperature:g}"

    return (
        f"found {named(found)}, expected {named(expected)}: draws are made from the teacher's logits "
        "(draws_from_logits), and are not distributions themselves"
    )


def _with_prior(config: LearnedConfig, prior: Prior | None) -> Any:
    """The configuration with the hash of its prior.

    Raises:
        ConfigError: it names a prior, but there is none.
        CorruptDataError: the prior is another than it names.
    """
    if config.prior is not None and prior is None:
        raise ConfigError(f"prior: the configuration names {config.prior}, but no prior was passed")
    if prior is not None and config.prior not in (None, prior.hash):
        raise CorruptDataError(
            f"{prior.source}: its hash is {prior.hash}, expected {config.prior}: it is another prior, or damaged"
        )
    return config if prior is None else config.model_copy(update={"prior": prior.hash})


@lru_cache(maxsize=16)
def _learned_codec(
    config: type[LearnedConfig], config_json: str, prior: Prior | None
) -> _native.CompactCodec | _native.SampledCodec:
    """The native codec, made once: preparing a prior's tables takes some milliseconds.

    Raises:
        CorruptDataError: the prior is damaged; names it.
    """
    native = _native.CompactCodec if config is CompactConfig else _native.SampledCodec
    if prior is None:
        return native(config_json, None)
    try:
        return native(config_json, prior.data)
    except CorruptDataError as error:
        raise CorruptDataError(f"{prior.source}: {error}") from error


def _check_version(name: str, version: int) -> None:
    if name not in _VERSIONS or version > _VERSIONS[name] or version < 1:
        known = ", ".join(f"{known} up to version {newest}" for known, newest in _VERSIONS.items())
        raise UnsupportedVersionError(
            f"the data is in codec format '{name}' version {version}; this release reads {known}; update distillkit"
        )


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
