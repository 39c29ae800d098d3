"""Writing a dataset: whole shards only, the manifest last."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distillkit.codec import Codec
from distillkit.codec.fidelity import FidelityStats
from distillkit.errors import CorruptDataError, InputError
from distillkit.shards.header import Header
from distillkit.shards.manifest import Manifest, ShardInfo, merged_fidelity, read_manifest
from distillkit.shards.reader import ShardFile
from distillkit.shards.storage import Folder, file_hash, writing
from distillkit.shards.table import SCHEMA, GroupDigest, check_document, document_id, document_table, int32_array
from distillkit.types import Document, SparseLogprobs

__all__ = [
    "NewShard",
    "ShardWriter",
    "encode_rows",
    "kept_array",
    "make_document",
    "shard_info",
    "shard_name",
    "whole_shards",
]

_ROW_GROUP_BYTES = 1 << 20
"""Teacher bytes of a row group: what random access reads at a time."""
_SHARD_NAME = re.compile(r"data-(\d{5,})\.parquet")


def shard_name(number: int) -> str:
    """The file name of a dataset's shard."""
    return f"data-{number:05}.parquet"


def whole_shards(folder: str | os.PathLike[str]) -> list[tuple[ShardInfo, Header]]:
    """The shards that an interrupted run left in a folder (a path or an fsspec URL), in order, each with its header.

    Raises:
        CorruptDataError: one is damaged, or one is missing between others.
    """
    place = Folder(folder)
    found = []
    for number, name in enumerate(name for name in place.names() if _SHARD_NAME.fullmatch(name)):
        if name != shard_name(number):
            raise CorruptDataError(f"{folder}: {shard_name(number)} is missing, but {name} is there")
        found.append(shard_info(place, name))
    return found


def shard_info(folder: Folder, name: str) -> tuple[ShardInfo, Header]:
    """What a shard holds, with the hash of the file, and its header.

    Raises:
        CorruptDataError: it is damaged.
    """
    shard = ShardFile(folder.of(name))
    with fsspec.open(folder.of(name), "rb") as file:
        return replace(shard.info(), xxh3_128=file_hash(file)), shard.header


def encode_rows(codec: Codec, rows: SparseLogprobs) -> tuple[bytes, FidelityStats]:
    """A document's rows as the codec's bytes, compared with what they decode to.

    Args:
        rows: numpy (R, k).

    Raises:
        InputError: as `Codec.encode`.
    """
    data = codec.encode_document(rows)
    ids, logprobs = np.asarray(rows.ids), np.asarray(rows.logprobs)
    if (logprobs[:, 1:] > logprobs[:, :-1]).any():
        # The codec sorts rows that are not; the comparison needs the same order.
        order = np.argsort(-logprobs, axis=-1, kind="stable")
        ids, logprobs = np.take_along_axis(ids, order, -1), np.take_along_axis(logprobs, order, -1)
    original = SparseLogprobs(ids, logprobs)
    stats = FidelityStats()
    stats.update(original, codec.decode_document(data, len(rows.ids)))
    return data, stats


class ShardWriter:
    """Writes documents into the shards of a dataset's folder.

    As a context manager it finishes the dataset on success. On an exception the shard in work is removed, whole
    shards stay, and there is no manifest: the folder is that of an interrupted capture, which `resume=True` continues.

    Equal documents and settings give equal files: nothing in them depends on the time or the machine.

    Args:
        folder: a path or an fsspec URL; made if it does not exist.
        header: of every shard; its `fidelity` is measured here and must be None.
        shard_tokens: a shard is finished once it has at least this many tokens.
        resume: go on after the whole shards in the folder; without it the folder must have none.

    Attributes:
        resumed: the shards that were there.

    Raises:
        InputError: the folder holds shards or a finished dataset already.
        MismatchError: its shards have another header.
        CorruptDataError: its shards are damaged.

    Example:
        >>> import numpy as np
        >>> from distillkit.codec import Codec, preset
        >>> from distillkit.shards import Dataset, Header, ShardWriter
        >>> codec = Codec(preset("budget", vocab_size=1000))
        >>> logits = np.random.default_rng(0).standard_normal((9, 1000), dtype=np.float32)
        >>> header = Header(codec=codec.to_dict(), vocab_size=1000, head_size=1000)
        >>> with ShardWriter("new", header) as writer:
        ...     writer.write(np.arange(10), codec.encode_logits(logits).tobytes())
        >>> len(Dataset.open("new"))
        1
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        header: Header,
        *,
        shard_tokens: int = 262_144,
        resume: bool = False,
    ) -> None:
        if header.fidelity is not None:
            raise InputError("the writer measures fidelity itself: pass a header without fidelity")
        self._folder = Folder(folder)
        self._header = header
        self._codec = header.make_codec()
        self._shard_tokens = shard_tokens
        self._folder.make()
        self._shards, self._headers = self._existing(resume)
        self.resumed: tuple[ShardInfo, ...] = tuple(self._shards)
        self._folder.remove_leftovers()
        self._open: NewShard | None = None
        self._manifest: Manifest | None = None
        self._failed = False

    def _existing(self, resume: bool) -> tuple[list[ShardInfo], list[Header]]:
        if read_manifest(self._folder.url) is not None:
            raise InputError(f"{self._folder}: holds a finished dataset; choose another folder or remove it")
        found = whole_shards(self._folder.url)
        if found and not resume:
            raise InputError(
                f"{self._folder}: holds {len(found)} shards of an unfinished dataset; resume it, choose another folder "
                "or remove them"
            )
        for info, header in found:
            self._header.check_same(header, where=self._folder.of(info.file))
        return [info for info, _ in found], [header for _, header in found]

    def write(
        self,
        input_ids: npt.NDArray[Any],
        teacher: SparseLogprobs | bytes | bytearray | memoryview,
        *,
        loss_mask: npt.NDArray[Any] | None = None,
        segment_lengths: npt.NDArray[Any] | None = None,
        label_logprobs: npt.NDArray[Any] | None = None,
    ) -> None:
        """Adds a document, and finishes the shard where that makes it large enough.

        Args:
            input_ids: (L,) integers.
            teacher: the distributions of its rows, numpy (R, k), which are encoded and compared with what they decode
                to; or bytes that the codec has already made, whose fidelity is then not known.
            loss_mask: (L,) bool, or 0 and 1.
            segment_lengths: (S,) integers, lengths of packed documents.
            label_logprobs: (L − 1,) the teacher's log-probability of each next token.

        Raises:
            InputError: wrong values or shapes, or a number of rows that the header's alignment does not give.
            OSError: the file cannot be written (a full disk, for example); whole shards stay, and this writer writes
                no more.
        """
        self._check_usable()
        stats: FidelityStats | None = None
        if isinstance(teacher, SparseLogprobs):
            _check_rows(teacher, len(np.asarray(input_ids)), self._header)
            data, stats = encode_rows(self._codec, teacher)
        else:
            data = bytes(teacher)
        document = make_document(
            input_ids,
            data,
            self._header,
            self._codec,
            loss_mask=loss_mask,
            segment_lengths=segment_lengths,
            label_logprobs=label_logprobs,
        )
        with self._failing():
            if self._open is None:
                self._open = NewShard(self._folder, shard_name(len(self._shards)))
            self._open.add(document, stats)
        if self._open.tokens >= self._shard_tokens:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Makes what was written so far a whole shard; nothing if there is none.

        Raises:
            InputError, OSError: as `write`.
        """
        self._check_usable()
        if self._open is None:
            return
        header = replace(self._header, fidelity=self._open.fidelity())
        with self._failing():
            self._shards.append(self._open.finish(header))
        self._headers.append(header)
        self._open = None

    def _check_usable(self) -> None:
        if self._failed:
            raise InputError(f"{self._folder}: an earlier write failed; continue with a new writer and resume=True")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Where something cannot be written, documents are lost: nothing may be built on what is left."""
        try:
            yield
        except BaseException:
            self._failed = True
            self.abort()
            raise

    def close(self) -> Manifest:
        """Finishes the last shard and writes the manifest; closing again changes nothing.

        Raises:
            InputError: no document was written.
        """
        if self._manifest is not None:
            return self._manifest
        self.finish_shard()
        if not self._shards:
            raise InputError(f"{self._folder}: no documents were written, so there is no dataset to finish")
        manifest = Manifest(replace(self._header, fidelity=merged_fidelity(self._headers)), tuple(self._shards))
        with self._failing():
            manifest.write(self._folder)
        self._manifest = manifest
        return manifest

    def abort(self) -> None:
        """Removes the shard in work."""
        if self._open is not None:
            self._open.abort()
            self._open = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _check_rows(rows: SparseLogprobs, tokens: int, header: Header) -> None:
    expected = header.rows_of(tokens)
    if len(rows.ids) != expected:
        raise InputError(
            f"a document of {tokens} tokens has {expected} rows (alignment {header.alignment['rows']}), got "
            f"{len(rows.ids)}"
        )


def make_document(
    input_ids: npt.NDArray[Any],
    teacher: bytes,
    header: Header,
    codec: Codec,
    *,
    loss_mask: npt.NDArray[Any] | None = None,
    segment_lengths: npt.NDArray[Any] | None = None,
    label_logprobs: npt.NDArray[Any] | None = None,
) -> Document:
    """A document for a shard with this header and its codec; see `ShardWriter.write`.

    Raises:
        InputError: wrong values or shapes, or a number of rows that the header's alignment does not give.
    """
    ids = int32_array(input_ids, "input_ids")
    lengths = None if segment_lengths is None else int32_array(segment_lengths, "segment_lengths")
    mask = None if loss_mask is None else _mask(loss_mask)
    labels = None if label_logprobs is None else np.ascontiguousarray(label_logprobs, dtype=np.float32)
    doc_id, rows = document_id(ids, mask, lengths), header.rows_of(len(ids))
    document = Document(doc_id, ids, teacher, rows, mask, lengths, labels)
    try:
        check_document(document, header, codec, "the document")
    except CorruptDataError as error:
        raise InputError(str(error)) from None
    return document


def _mask(loss_mask: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    mask = np.asarray(loss_mask)
    if mask.dtype != np.bool_ and not (mask.dtype.kind in "iu" and np.isin(mask, (0, 1)).all()):
        raise InputError(
            f"loss_mask must be bool, or 0 and 1; got {mask.dtype}, with values such as {mask[:8].tolist()}"
        )
    return mask.astype(np.bool_)


class NewShard:
    """A shard being written: nothing is there until it is finished.

    Args:
        folder: where.
        name: the file's.
        kept: columns of the source that documents bring besides.

    Attributes:
        documents, tokens, rows: what it has so far.

    Raises:
        OSError: it cannot be written; says which file, and that finished shards are kept.
    """

    def __init__(self, folder: Folder, name: str, kept: pa.Schema | None = None) -> None:
        self._place, self._kept = folder.of(name), kept or pa.schema([])
        self._folder, self._name = folder, name
        with writing(self._place):
            self._file = folder.new_file(name)
        self._writer = pq.ParquetWriter(
            self._file.stream,
            pa.schema([*SCHEMA, *self._kept]),
            # Packed bytes do not compress; ids, masks and what the source brings do.
            compression=dict.fromkeys(_leaves(pa.schema([*SCHEMA, *self._kept])), "zstd")
            | {"teacher": "none", "checksum": "none"},
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        self._pending: list[Document] = []
        self._columns: list[Mapping[str, Any]] = []
        self._pending_bytes = 0
        self._groups: list[GroupDigest] = []
        self._stats: FidelityStats | None = FidelityStats()
        self.documents = self.tokens = self.rows = 0

    def add(self, document: Document, stats: FidelityStats | None, columns: Mapping[str, Any] | None = None) -> None:
        """Adds a document, with its fidelity (None if it is not known) and the kept columns of its source's row.

        Raises:
            InputError: a kept column has a value of another type.
        """
        if stats is None:
            self._stats = None
        elif self._stats is not None:
            self._stats.merge(stats)
        self._pending.append(document)
        self._columns.append(columns or {})
        self._pending_bytes += len(document.teacher)
        self.documents += 1
        self.tokens += len(document.input_ids)
        self.rows += document.num_rows
        if self._pending_bytes >= _ROW_GROUP_BYTES:
            self._write_row_group()

    def fidelity(self) -> dict[str, Any] | None:
        """Figures over its documents, None if those of one are not known."""
        return None if self._stats is None else self._stats.to_dict()

    def _write_row_group(self) -> None:
        if not self._pending:
            return
        table = document_table(self._pending)
        for field in self._kept:
            table = table.append_column(field, kept_array([row.get(field.name) for row in self._columns], field))
        with writing(self._place):
            self._writer.write_table(table, row_group_size=len(self._pending))
        self._groups.append(GroupDigest.of(table))
        self._pending, self._columns, self._pending_bytes = [], [], 0

    def finish(self, header: Header) -> ShardInfo:
        """Writes the rest, durably, and gives it its name."""
        self._write_row_group()
        with writing(self._place):
            self._writer.add_key_value_metadata({**header.to_metadata(), **GroupDigest.to_metadata(self._groups)})
            self._writer.close()
            self._file.stream.flush()
            with open(self._file.stream.name, "rb") as file:
                digest, size = file_hash(file), os.fstat(file.fileno()).st_size
            self._file.publish()
        return ShardInfo(self._name, self.documents, self.tokens, self.rows, size, digest)

    def abort(self) -> None:
        """Throws it away."""
        # What is buffered is thrown away with the file; that it cannot be written either is no news.
        with contextlib.suppress(OSError, ValueError):
            self._writer.close()
        self._file.abandon()


def kept_array(values: list[Any], field: pa.Field) -> pa.Array:
    """Values of a kept column.

    Raises:
        InputError: one is of another type than the column.
    """
    try:
        return pa.array(values, type=field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"the source's column {field.name}, which is to be kept, has the type {field.type}: {error}"
        ) from error


def _leaves(schema: pa.Schema) -> list[str]:
    """The paths by which Parquet calls the leaves of a schema."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema) as writer:
        writer.write_table(schema.empty_table())
    columns = pq.ParquetFile(sink).schema
    return [columns.column(index).path for index in range(len(columns))]
