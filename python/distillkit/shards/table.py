"""Documents ↔ rows of a shard's Parquet table, with their checksums (FORMAT.md §2)."""

from __future__ import annotations

import itertools
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from distillkit.codec import Codec
from distillkit.errors import CorruptDataError, InputError, printable
from distillkit.shards.header import Header, hashed_metadata, read_hashed_metadata
from distillkit.types import Document, SparseLogprobs

if TYPE_CHECKING:
    import torch

__all__ = [
    "SCHEMA",
    "Block",
    "Documents",
    "GroupDigest",
    "KeptRows",
    "ShardRows",
    "check_document",
    "document_id",
    "document_table",
    "int32_array",
    "make_block",
]

GROUPS_KEY = b"distillkit.groups"

_HIGHEST_LOGPROB = 1e-4
"""Log-probabilities are at most 0 up to rounding; a label's is a difference of float32 values with magnitudes up to a
few tens."""

SCHEMA = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("teacher", pa.large_binary(), nullable=False),
        pa.field("checksum", pa.int64(), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_())),
        pa.field("segment_lengths", pa.list_(pa.int32())),
        pa.field("label_logprobs", pa.list_(pa.float32())),
    ]
)


def int32_array(values: Any, name: str) -> npt.NDArray[np.int32]:
    """Converts integers to int32.

    Raises:
        InputError: the values are not integers, negative or too large, or not one-dimensional.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InputError(f"{name} must be one-dimensional integers, got {array.dtype} of shape {array.shape}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**31:
        raise InputError(f"{name} range from {array.min()} to {array.max()}; they must be between 0 and 2³¹ − 1")
    return np.ascontiguousarray(array, dtype=np.int32)


@dataclass(frozen=True)
class GroupDigest:
    """The digest of a row group in a shard's metadata: document count, and XXH3-128 of their checksums in order.

    It detects documents that are individually valid but missing, duplicated or moved.
    """

    documents: int
    xxh3: str

    @classmethod
    def of(cls, table: pa.Table) -> GroupDigest:
        """The digest of a row group."""
        checksums = table.column("checksum").to_numpy().astype("<i8")
        return cls(len(checksums), xxhash.xxh3_128_hexdigest(checksums.tobytes()))

    @staticmethod
    def to_metadata(groups: Sequence[GroupDigest]) -> dict[bytes, bytes]:
        """Key-value metadata of the Parquet file: the digests and their hash."""
        return hashed_metadata(GROUPS_KEY, [[group.documents, group.xxh3] for group in groups])

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None, *, where: str) -> list[GroupDigest]:
        """Reads the digests of a file's row groups, in order.

        Raises:
            CorruptDataError: they are missing or were modified.
        """
        content = read_hashed_metadata(metadata, GROUPS_KEY, where=where)
        if isinstance(content, list) and all(_is_digest(entry) for entry in content):
            return [cls(documents, digest) for documents, digest in content]
        raise CorruptDataError(f"{where}: {GROUPS_KEY.decode()} is not a list of row groups: {content!r:.200}")


def _is_digest(entry: object) -> bool:
    return isinstance(entry, list) and [type(part) for part in entry] == [int, str] and entry[0] >= 0


def _fields(document: Document) -> Iterator[Any]:
    yield document.doc_id.encode()
    yield from _deciding_fields(document.input_ids, document.loss_mask, document.segment_lengths)
    if document.label_logprobs is not None:
        yield b"l" + np.ascontiguousarray(document.label_logprobs, dtype="<f4").tobytes()
    yield document.teacher


def _deciding_fields(
    input_ids: npt.NDArray[Any], loss_mask: npt.NDArray[Any] | None, segment_lengths: npt.NDArray[Any] | None
) -> Iterator[bytes]:
    yield np.ascontiguousarray(input_ids, dtype="<i4").tobytes()
    # The prefix distinguishes an empty field from an absent one.
    yield b"" if loss_mask is None else b"m" + np.ascontiguousarray(loss_mask, dtype=np.uint8).tobytes()
    yield b"" if segment_lengths is None else b"s" + np.ascontiguousarray(segment_lengths, dtype="<i4").tobytes()


def document_id(
    input_ids: npt.NDArray[Any],
    loss_mask: npt.NDArray[Any] | None = None,
    segment_lengths: npt.NDArray[Any] | None = None,
) -> str:
    """XXH3-128 over token ids, loss mask and segment lengths, as 32 hexadecimal digits."""
    state = xxhash.xxh3_128()
    for part in _deciding_fields(input_ids, loss_mask, segment_lengths):
        state.update(struct.pack("<Q", len(part)))
        state.update(part)
    return str(state.hexdigest())


def checksum(document: Document) -> int:
    """XXH3-64 over the document's fields, each preceded by its length, as a signed 64-bit integer."""
    *small, teacher = _fields(document)
    state = xxhash.xxh3_64(b"".join([struct.pack("<Q", len(part)) + part for part in small]))
    state.update(struct.pack("<Q", len(teacher)))
    state.update(teacher)
    return int.from_bytes(state.digest(), "big", signed=True)


def document_table(documents: Sequence[Document]) -> pa.Table:
    """The table of one row group of a shard."""

    def lists(values: Sequence[npt.NDArray[Any] | None], kind: pa.DataType) -> pa.Array:
        return pa.array(values, type=pa.list_(kind))

    columns = [
        pa.array([document.doc_id for document in documents], type=pa.string()),
        lists([document.input_ids for document in documents], pa.int32()),
        pa.array([document.teacher for document in documents], type=pa.large_binary()),
        pa.array([checksum(document) for document in documents], type=pa.int64()),
        lists([document.loss_mask for document in documents], pa.bool_()),
        lists([document.segment_lengths for document in documents], pa.int32()),
        lists([document.label_logprobs for document in documents], pa.float32()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


@dataclass(frozen=True)
class Block:
    """Consecutive documents, read and checked together, with their teacher bytes in one piece.

    Attributes:
        documents: the documents; their `teacher` fields are parts of `data`.
        data: the encoded bytes of all documents in order.
        ends: (D,) int64, the end of each document's rows among the R rows of all.
        codec: decodes the rows.
        where: file and document numbers, for messages.
    """

    documents: tuple[Document, ...]
    data: bytes | bytearray | memoryview
    ends: npt.NDArray[np.int64]
    codec: Codec
    where: str

    @property
    def rows(self) -> npt.NDArray[np.uint8]:
        """(R, bytes_per_token) uint8, `data` as rows; only of fixed formats."""
        return self.codec.document_rows(memoryview(self.data), int(self.ends[-1]) if len(self.ends) else 0)

    def decode(self) -> SparseLogprobs:
        """Decodes all rows, to numpy (R, k).

        Raises:
            CorruptDataError: as for `Codec.decode_document`.
        """
        shape = (int(self.ends[-1]) if len(self.ends) else 0, self.codec.k)
        rows = SparseLogprobs(np.empty(shape, np.int64), np.empty(shape, np.float32), self.codec.draws)
        # Documents of a fixed format can be decoded together, on all cores.
        parts = [(self.data, shape[0])] if self.codec.is_fixed else [(d.teacher, d.num_rows) for d in self.documents]
        end = 0
        for data, count in parts:
            part = slice(end, end := end + count)
            try:
                self.codec.decode_document(memoryview(data), count, out=(rows.ids[part], rows.logprobs[part]))
            except CorruptDataError as error:
                raise CorruptDataError(f"{self.where}: {error}") from error
        return rows

    def tensor(self) -> torch.Tensor:
        """`rows` as a torch tensor, to be moved to a device and decoded there with `decode_torch`.

        Shares the memory of `data` if that is writeable; otherwise a copy.
        """
        import torch

        rows = self.rows
        return torch.from_numpy(rows if rows.flags.writeable else rows.copy())


def make_block(documents: Sequence[Document], data: Any, codec: Codec, where: str, first: int) -> Block:
    """Makes a block of documents, numbered from `first`, whose teacher bytes are contiguous in `data`."""
    ends = np.cumsum([document.num_rows for document in documents], dtype=np.int64)
    return Block(tuple(documents), data, ends, codec, f"{where}, documents {first} to {first + len(documents) - 1}")


class Documents(ABC):
    """A sequence of documents."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Document: ...

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))


class KeptRows:
    """The columns that a capture kept of a row group's source rows, read when they are first used.

    Args:
        names: the columns.
        read: reads them: one mapping for each document.
    """

    def __init__(self, names: Sequence[str], read: Callable[[], list[dict[str, Any]]]) -> None:
        self.names, self._read = names, read

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return self._read()


class KeptColumns(Mapping[str, Any]):
    """The values of one document's kept columns, by name."""

    def __init__(self, kept: KeptRows, index: int) -> None:
        self._kept, self._index = kept, index

    def __getitem__(self, name: str) -> Any:
        return self._kept.rows[self._index][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept.names)

    def __len__(self) -> int:
        return len(self._kept.names)

    def __repr__(self) -> str:
        return printable(repr(dict(self)))


class ShardRows(Documents):
    """The documents of one row group, each checked on access.

    Args:
        table: those columns of `SCHEMA` that exist.
        header, codec: those of the shard.
        where: the shard, for messages.
        first: the shard-wide number of the first document.
        kept: reads the columns that were kept of the documents' source rows; None if there are none.

    Raises (also when indexing):
        CorruptDataError: nulls in a required column, a wrong checksum, or fields that contradict each other, the header
            or the codec.
    """

    def __init__(
        self,
        table: pa.Table,
        header: Header,
        codec: Codec,
        where: str,
        first: int,
        kept: KeptRows | None = None,
    ) -> None:
        self._header, self._codec, self._where, self._first, self._kept = header, codec, where, first, kept
        arrays = {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            # combine_chunks copies even a single chunk.
            arrays[name] = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
            if not SCHEMA.field(name).nullable and column.null_count:
                raise CorruptDataError(f"{where}: column {name} has nulls")
        self._doc_ids: list[str] = arrays["doc_id"].to_pylist()
        self._checksums: list[int] = arrays["checksum"].to_pylist()
        self._teacher, self._bounds = _binary(arrays["teacher"])
        # Unknown columns are ignored, and optional ones may be absent.
        self._input_ids, self._masks, self._lengths, self._labels = (
            _lists(arrays[name], f"{where}: column {name}") if name in arrays else [None] * len(self)
            for name in ("input_ids", "loss_mask", "segment_lengths", "label_logprobs")
        )

    def __len__(self) -> int:
        return len(self._doc_ids)

    def __getitem__(self, index: int) -> Document:
        document = self._view(index)
        # A view would keep the entire group in memory.
        return replace(document, teacher=bytes(document.teacher))

    def block(self) -> Block:
        """All documents as one block, without a copy."""
        documents = [self._view(index) for index in range(len(self))]
        data = self._teacher[self._bounds[0] : self._bounds[-1]]
        return make_block(documents, data, self._codec, self._where, self._first)

    def _view(self, index: int) -> Document:
        where = f"{self._where}, document {self._first + index}"
        input_ids = self._input_ids[index]
        if input_ids is None:
            raise CorruptDataError(f"{where}: nulls in input_ids")
        document = Document(
            self._doc_ids[index],
            input_ids,
            self._teacher[self._bounds[index] : self._bounds[index + 1]],
            self._header.rows_of(len(input_ids)),
            self._masks[index],
            self._lengths[index],
            self._labels[index],
            where,
            None if self._kept is None else KeptColumns(self._kept, index),
        )
        found, stored = checksum(document), self._checksums[index]
        if found != stored:
            raise CorruptDataError(
                f"{where}: checksum {found}, expected {stored}: the document was modified; capture or download "
                "its shard again"
            )
        own = document_id(document.input_ids, document.loss_mask, document.segment_lengths)
        if document.doc_id != own:
            raise CorruptDataError(f"{where}: doc_id is {document.doc_id!r:.100}, expected {own}")
        check_document(document, self._header, self._codec, where)
        return document


def _binary(array: pa.LargeBinaryArray) -> tuple[memoryview, list[int]]:
    """A binary column's data buffer and its value boundaries: the start of each value, and the end of the last."""
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, dtype="<i8")[array.offset : array.offset + len(array) + 1]
    return memoryview(b"" if data is None else data), bounds.tolist()


def _lists(array: pa.ListArray, where: str) -> list[npt.NDArray[Any] | None]:
    """The lists of a column, None for nulls. Not copied if numpy can represent the Arrow buffer directly."""
    if array.null_count == len(array):
        return [None] * len(array)
    bounds = array.offsets.to_numpy().tolist()
    values = array.values.slice(bounds[0], bounds[-1] - bounds[0])
    if values.null_count:
        raise CorruptDataError(f"{where} has nulls in its lists")
    flat = values.to_numpy(zero_copy_only=False)
    present = array.is_valid().to_pylist()
    return [
        flat[start - bounds[0] : end - bounds[0]] if valid else None
        for valid, (start, end) in zip(present, itertools.pairwise(bounds), strict=True)
    ]


def check_document(document: Document, header: Header, codec: Codec, where: str) -> None:
    """Checks that the parts of a document are consistent.

    Raises:
        CorruptDataError: they are not; the message says which part.
    """
    tokens = len(document.input_ids)
    if tokens and not 0 <= int(document.input_ids.min()) <= int(document.input_ids.max()) < header.head_size:
        raise CorruptDataError(
            f"{where}: token ids from {document.input_ids.min()} to {document.input_ids.max()}, but the head has "
            f"{header.head_size} entries"
        )
    try:
        codec.check_document(document.teacher, document.num_rows)
    except CorruptDataError as error:
        raise CorruptDataError(f"{where}: the teacher's bytes do not fit {tokens} tokens: {error}") from error
    if document.loss_mask is not None and len(document.loss_mask) != tokens:
        raise CorruptDataError(f"{where}: loss_mask has {len(document.loss_mask)} entries for {tokens} tokens")
    labels = document.label_logprobs
    if labels is not None and (len(labels) != max(tokens - 1, 0) or not (labels <= _HIGHEST_LOGPROB).all()):
        raise CorruptDataError(
            f"{where}: label_logprobs has {len(labels)} entries for {tokens} tokens, or values that are positive or NaN"
        )
    lengths = document.segment_lengths
    if lengths is not None and (int(lengths.sum()) != tokens or (len(lengths) and int(lengths.min()) < 1)):
        raise CorruptDataError(f"{where}: segment_lengths {lengths.tolist()} do not add up to {tokens} tokens")
