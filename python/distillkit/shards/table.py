"""Documents ↔ rows of a shard's Parquet table, with their checksums (FORMAT.md §2)."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from distillkit.codec import Codec
from distillkit.errors import CorruptDataError, DistillKitError, InputError
from distillkit.shards.header import Header, hashed_metadata, read_hashed_metadata
from distillkit.types import Document

__all__ = [
    "SCHEMA",
    "Documents",
    "GroupDigest",
    "ShardRows",
    "check_document",
    "document_id",
    "document_table",
    "int32_array",
    "reading",
]

GROUPS_KEY = b"distillkit.groups"

SCHEMA = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("teacher", pa.large_binary(), nullable=False),
        pa.field("checksum", pa.int64(), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_())),
        pa.field("segment_lengths", pa.list_(pa.int32())),
    ]
)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns what pyarrow raises over damaged files into CorruptDataError.

    Errors of the operating system (a missing file, no more open files, a device) have a number and stay what they are.
    """
    try:
        yield
    except DistillKitError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorruptDataError(f"{where}: can not be read: {error}") from error


def int32_array(values: Any, name: str) -> npt.NDArray[np.int32]:
    """Integers as int32.

    Raises:
        InputError: they are no integers, negative or too large.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InputError(f"{name} must be one axis of integers, got {array.dtype} of shape {array.shape}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**31:
        raise InputError(f"{name} go from {array.min()} to {array.max()}; they must be between 0 and 2³¹ − 1")
    return np.ascontiguousarray(array, dtype=np.int32)


@dataclass(frozen=True)
class GroupDigest:
    """What a shard's metadata says of a row group: how many documents, and the XXH3-128 of their checksums in order.

    It ties documents to their places: one that is missing, doubled or moved is noticed, each by itself sound.
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
        """The digests of a file's row groups, in order.

        Raises:
            CorruptDataError: there are none, or they were changed.
        """
        content = read_hashed_metadata(metadata, GROUPS_KEY, where=where)
        try:
            return [cls(int(documents), str(digest)) for documents, digest in content]
        except (TypeError, ValueError) as error:
            raise CorruptDataError(f"{where}: its list of row groups is not one: {error}") from error


def _fields(document: Document) -> Iterator[bytes]:
    yield document.doc_id.encode()
    yield from _deciding_fields(document.input_ids, document.loss_mask, document.segment_lengths)
    yield document.teacher


def _deciding_fields(
    input_ids: npt.NDArray[Any], loss_mask: npt.NDArray[Any] | None, segment_lengths: npt.NDArray[Any] | None
) -> Iterator[bytes]:
    yield np.ascontiguousarray(input_ids, dtype="<i4").tobytes()
    # An absent field and an empty one differ.
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
    """XXH3-64 over the document's fields, each preceded by its length, as a signed integer."""
    state = xxhash.xxh3_64()
    for part in _fields(document):
        state.update(struct.pack("<Q", len(part)))
        state.update(part)
    return int.from_bytes(state.digest(), "big", signed=True)


def document_table(documents: Sequence[Document]) -> pa.Table:
    """One row group of a shard."""

    def lists(values: Sequence[npt.NDArray[Any] | None], kind: pa.DataType) -> pa.Array:
        return pa.array(values, type=pa.list_(kind))

    columns = [
        pa.array([document.doc_id for document in documents], type=pa.string()),
        lists([document.input_ids for document in documents], pa.int32()),
        pa.array([document.teacher for document in documents], type=pa.large_binary()),
        pa.array([checksum(document) for document in documents], type=pa.int64()),
        lists([document.loss_mask for document in documents], pa.bool_()),
        lists([document.segment_lengths for document in documents], pa.int32()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


class Documents(ABC):
    """Some documents, by index and in order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Document: ...

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))


class ShardRows(Documents):
    """The documents of one row group; each is checked when it is taken.

    Raises (from indexing):
        CorruptDataError: the checksum differs, or fields contradict each other, the header or the codec.
    """

    def __init__(self, table: pa.Table, header: Header, codec: Codec, where: str, first: int) -> None:
        self._header, self._codec, self._where, self._first = header, codec, where, first
        self._columns = {}
        for name in SCHEMA.names:
            # Readers ignore columns they do not know; files without the optional ones are whole.
            if name not in table.column_names:
                continue
            column = table.column(name).combine_chunks()
            if not SCHEMA.field(name).nullable and column.null_count:
                raise CorruptDataError(f"{where}: column {name} has nulls")
            self._columns[name] = column
        self._rows: int = table.num_rows

    def __len__(self) -> int:
        return self._rows

    def _list(self, name: str, index: int, dtype: Any) -> npt.NDArray[Any] | None:
        column = self._columns.get(name)
        if column is None or not column[index].is_valid:
            return None
        values = column[index].values
        if values.null_count:
            raise CorruptDataError(f"{self._where}, document {self._first + index}: nulls in {name}")
        return np.asarray(values.to_numpy(zero_copy_only=False), dtype=dtype)

    def __getitem__(self, index: int) -> Document:
        where = f"{self._where}, document {self._first + index}"
        with reading(where):
            input_ids = self._list("input_ids", index, np.int32)
            assert input_ids is not None
            document = Document(
                doc_id=self._columns["doc_id"][index].as_py(),
                input_ids=input_ids,
                teacher=self._columns["teacher"][index].as_buffer().to_pybytes(),
                num_rows=self._header.rows_of(len(input_ids)),
                loss_mask=self._list("loss_mask", index, np.bool_),
                segment_lengths=self._list("segment_lengths", index, np.int32),
            )
            stored = self._columns["checksum"][index].as_py()
        if checksum(document) != stored:
            raise CorruptDataError(
                f"{where}: checksum {checksum(document)}, expected {stored}: the document was changed; capture or "
                "fetch its shard again"
            )
        check_document(document, self._header, self._codec, where)
        return document


def check_document(document: Document, header: Header, codec: Codec, where: str) -> None:
    """Refuses a document whose parts do not fit together.

    Raises:
        CorruptDataError: says which part.
    """
    tokens = len(document.input_ids)
    if tokens and not 0 <= int(document.input_ids.min()) <= int(document.input_ids.max()) < header.head_size:
        raise CorruptDataError(
            f"{where}: token ids from {document.input_ids.min()} to {document.input_ids.max()}, but the head has "
            f"{header.head_size} entries"
        )
    expected = document.num_rows * codec.bytes_per_token
    if len(document.teacher) != expected:
        raise CorruptDataError(
            f"{where}: {len(document.teacher)} teacher bytes, but {document.num_rows} rows ({tokens} tokens) take "
            f"{expected}"
        )
    if document.loss_mask is not None and len(document.loss_mask) != tokens:
        raise CorruptDataError(f"{where}: loss_mask has {len(document.loss_mask)} entries for {tokens} tokens")
    lengths = document.segment_lengths
    if lengths is not None and (int(lengths.sum()) != tokens or (len(lengths) and int(lengths.min()) < 1)):
        raise CorruptDataError(f"{where}: segment_lengths {lengths.tolist()} do not make up {tokens} tokens")
