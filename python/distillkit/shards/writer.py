"""Writes a dataset: only complete shards, then the manifest."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distillkit.codec import Codec, Prior
from distillkit.codec.fidelity import FidelityStats, values_of
from distillkit.errors import CorruptDataError, DistillKitError, InputError
from distillkit.shards.header import Header
from distillkit.shards.lock import FolderLock
from distillkit.shards.manifest import (
    MANIFEST,
    Manifest,
    ShardInfo,
    is_shard_name,
    merged_fidelity,
    read_manifest,
    shard_name,
)
from distillkit.shards.prior import PRIOR, keep_prior, prior_metadata
from distillkit.shards.reader import ShardFile
from distillkit.shards.storage import Folder, file_hash, writing
from distillkit.shards.table import (
    GROUPS_KEY,
    SCHEMA,
    GroupDigest,
    check_document,
    document_id,
    document_table,
    int32_array,
)
from distillkit.types import Document, SparseLogprobs

__all__ = [
    "NewShard",
    "ShardWriter",
    "encode_rows",
    "is_dataset_file",
    "kept_array",
    "make_document",
    "shard_info",
    "stored_schema",
    "value_bytes",
    "whole_shards",
]

_ROW_GROUP_BYTES = 1 << 20
"""Bytes per row group, of the teacher and of kept columns: the unit that random access reads."""


def is_dataset_file(name: str) -> bool:
    """Whether a file name is that of a shard, the manifest or the prior."""
    return is_shard_name(name) or name in (MANIFEST, PRIOR)


def whole_shards(folder: str | os.PathLike[str]) -> list[tuple[ShardInfo, Header]]:
    """The finished shards of an interrupted run in a folder (a path or an fsspec URL), in order, with their headers.

    Raises:
        CorruptDataError: a shard is damaged, or missing from the sequence.
    """
    place = Folder(folder)
    found = []
    for number, name in enumerate(name for name in place.names() if is_shard_name(name)):
        if name != shard_name(number):
            raise CorruptDataError(f"{folder}: {shard_name(number)} is missing, but {name} exists")
        found.append(shard_info(place, name))
    return found


def shard_info(folder: Folder, name: str) -> tuple[ShardInfo, Header]:
    """A shard's counts, size and file hash, and its header. Reads and checks all of it, as its hash is taken over it.

    Raises:
        CorruptDataError: the shard is damaged.
    """
    shard = ShardFile(folder.of(name))
    for _ in shard.blocks():
        pass
    return replace(shard.info(), xxh3_128=folder.file_hash(name)), shard.header


def encode_rows(codec: Codec, rows: SparseLogprobs) -> tuple[bytes, SparseLogprobs, FidelityStats]:
    """Encodes a document's rows, and measures the fidelity of the result.

    Args:
        rows: numpy (R, k), or as for `Codec.encode_document`.

    Returns:
        The bytes; the stored ids in their stored order with the values that they had, (R, k); and the fidelity.

    Raises:
        InputError: as for `Codec.encode`.
    """
    data = codec.encode_document(rows)
    decoded = codec.decode_document(data, len(rows.ids))
    ids, logprobs = np.asarray(rows.ids), np.asarray(rows.logprobs)
    if codec.is_fixed and (logprobs[:, 1:] > logprobs[:, :-1]).any():
        # The codec sorts rows that are not in descending order; the comparison needs the same order.
        order = np.argsort(-logprobs, axis=-1, kind="stable")
        ids, logprobs = np.take_along_axis(ids, order, -1), np.take_along_axis(logprobs, order, -1)
    original = SparseLogprobs(ids, logprobs, rows.draws)
    if not codec.is_fixed:
        # Some of the ids, and ids of one level in another order.
        values, found = values_of(original, decoded)
        if not found.all():
            raise DistillKitError(f"row {int(found.argmin())} decodes to ids that it did not have; this is a bug")
        original = SparseLogprobs(np.asarray(decoded.ids), values, rows.draws)
    stats = FidelityStats()
    stats.update(original, decoded)
    return data, original, stats


class ShardWriter:
    """Writes documents to shards in a dataset's folder.

    Used as a context manager, it finishes the dataset on success. On an exception, it discards the shard being written,
    keeps finished shards, and writes no manifest; `resume=True` then resumes from that state.

    Output is reproducible: the same documents and settings give identical files, whatever the time or machine.

    Args:
        folder: a path or an fsspec URL; created if it does not exist.
        header: the header of every shard; its `fidelity` must be None, since the writer measures it.
        shard_tokens: a shard is finished once it has at least this many tokens.
        resume: continue after the finished shards in the folder; otherwise, there must be none.
        prior: what the header's codec names, if it names one; None if the folder has it already.
        standalone: put the prior into each shard as well, so that a shard can be read without the folder.
        kept: additional columns, kept from the source.

    Attributes:
        resumed: the finished shards found in the folder.

    Raises:
        InputError: the folder contains shards without `resume`, or a finished dataset; or another process is writing
            to it.
        MismatchError: its shards have a different header.
        CorruptDataError: its shards or its prior are damaged.

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
        prior: Prior | None = None,
        standalone: bool = False,
        kept: pa.Schema | None = None,
    ) -> None:
        if header.fidelity is not None:
            raise InputError("the writer measures fidelity itself: pass a header without fidelity")
        self._folder = Folder(folder)
        self._header = header
        self._standalone, self._kept = standalone, kept
        self._shard_tokens = shard_tokens
        self._open: NewShard | None = None
        self._folder.make()
        self._lock = FolderLock(self._folder)
        try:
            self._shards, self._headers = self._existing(resume)
            self._folder.remove_leftovers(is_dataset_file)
            self._codec = header.make_codec(keep_prior(self._folder, header, prior))
        except BaseException:
            self._lock.release()
            raise
        self.resumed: tuple[ShardInfo, ...] = tuple(self._shards)
        self._manifest: Manifest | None = None
        self._failed = False

    def _existing(self, resume: bool) -> tuple[list[ShardInfo], list[Header]]:
        if read_manifest(self._folder.url) is not None:
            raise InputError(f"{self._folder}: contains a finished dataset; choose another folder or remove it")
        found = whole_shards(self._folder.url)
        if found and not resume:
            raise InputError(
                f"{self._folder}: contains {len(found)} shards of an unfinished dataset; resume it, choose another "
                "folder or remove them"
            )
        for info, header in found:
            self._header.check_same(header, where=self._folder.of(info.file))
        return [info for info, _ in found], [header for _, header in found]

    def finished_documents(self) -> Iterator[Document]:
        """The documents of the shards that are finished now, in order."""
        places = [self._folder.of(shard.file) for shard in self._shards]
        return itertools.chain.from_iterable(ShardFile(place, self._codec.prior) for place in places)

    def copy(self, document: Document) -> None:
        """Adds another dataset's document with its encoded bytes, as `write` does, and with the same errors."""
        self.write(
            document.input_ids,
            document.teacher,
            loss_mask=document.loss_mask,
            segment_lengths=document.segment_lengths,
            label_logprobs=document.label_logprobs,
        )

    def write(
        self,
        input_ids: npt.NDArray[Any],
        teacher: SparseLogprobs | bytes | bytearray | memoryview,
        *,
        loss_mask: npt.NDArray[Any] | None = None,
        segment_lengths: npt.NDArray[Any] | None = None,
        label_logprobs: npt.NDArray[Any] | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds a document, and finishes the shard if it is now large enough.

        Args:
            input_ids: (L,) integers.
            teacher: the rows' distributions, numpy (R, k), which are encoded and their fidelity measured; or bytes
                already encoded by the codec, whose fidelity is then unknown.
            loss_mask: (L,) bool, or integers 0 and 1.
            segment_lengths: (S,) integers, lengths of packed documents.
            label_logprobs: (L − 1,) the teacher's log-probability of each next token.
            columns: values of the kept columns.

        Raises:
            InputError: wrong values or shapes, or a number of rows that contradicts the header's alignment.
            OSError: the file cannot be written (a full disk, for example). Finished shards are kept, but this writer
                can no longer be used.
        """
        self._check_usable()
        stats: FidelityStats | None = None
        if isinstance(teacher, SparseLogprobs):
            _check_rows(teacher, len(np.asarray(input_ids)), self._header)
            data, _, stats = encode_rows(self._codec, teacher)
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
                embedded = self._codec.prior if self._standalone else None
                self._open = NewShard(self._folder, shard_name(len(self._shards)), self._kept, prior=embedded)
            self._open.add(document, stats, columns)
        if self._open.tokens >= self._shard_tokens:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Finishes the shard being written, if there is one.

        Raises:
            InputError, OSError: as for `write`.
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
            raise InputError(
                f"{self._folder}: an earlier write failed or was aborted; continue with a new writer and resume=True"
            )

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Disables the writer if the block fails: documents were lost, so nothing may be written after them."""
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def close(self) -> Manifest:
        """Finishes the last shard and writes the manifest. Further calls have no effect.

        Raises:
            InputError: no documents were written.
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
        self._lock.release()
        return manifest

    def abort(self) -> None:
        """Discards the shard being written. Whole shards stay, for a new writer to resume from."""
        self._failed = self._failed or self._manifest is None
        if self._open is not None:
            self._open.abort()
            self._open = None
        self._lock.release()

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
    """Makes a document for a shard with this header and codec; see `ShardWriter.write`.

    Raises:
        InputError: wrong values or shapes, or a number of rows that contradicts the header's alignment.
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
    """A shard being written. The file does not appear until it is finished.

    Args:
        folder: the dataset's folder.
        name: the file name.
        kept: additional columns, kept from the source.
        prior: the codec's prior, if the shard is to stand alone.

    Attributes:
        documents, tokens, rows: counts so far.

    Raises:
        OSError: the file cannot be written; the message names it and says that finished shards are kept.
    """

    def __init__(self, folder: Folder, name: str, kept: pa.Schema | None = None, *, prior: Prior | None = None) -> None:
        self._prior = prior
        self._place, self._kept = folder.of(name), stored_schema(kept or pa.schema([]))
        self._folder, self._name = folder, name
        with writing(self._place):
            self._file = folder.new_file(name)
        self._writer = pq.ParquetWriter(
            self._file.stream,
            pa.schema([*SCHEMA, *self._kept]),
            # Packed bytes do not compress; ids, masks and kept columns do.
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
        """Adds a document, with its fidelity (None if unknown) and the kept columns of its source's row.

        Raises:
            InputError: a kept column has a value of the wrong type.
        """
        if stats is None:
            self._stats = None
        elif self._stats is not None:
            self._stats.merge(stats)
        self._pending.append(document)
        self._columns.append(columns or {})
        self._pending_bytes += len(document.teacher) + value_bytes(columns or {})
        self.documents += 1
        self.tokens += len(document.input_ids)
        self.rows += document.num_rows
        if self._pending_bytes >= _ROW_GROUP_BYTES:
            self._write_row_group()

    def fidelity(self) -> dict[str, Any] | None:
        """Fidelity over all its documents; None if that of any is unknown."""
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
        """Writes the remaining documents and metadata, and publishes the file."""
        self._write_row_group()
        with writing(self._place):
            groups = GroupDigest.to_metadata(self._groups)
            embedded = {} if self._prior is None else prior_metadata(self._prior)
            self._writer.add_key_value_metadata({**header.to_metadata(), **groups, **embedded})
            self._writer.close()
            self._file.stream.flush()
            with open(self._file.stream.name, "rb") as file:
                digest, size = file_hash(file), os.fstat(file.fileno()).st_size
            self._file.publish()
        bound = groups[GROUPS_KEY + b".xxh3"].decode()
        return ShardInfo(self._name, self.documents, self.tokens, self.rows, size, digest, bound)

    def abort(self) -> None:
        """Discards the shard."""
        # The buffered data is discarded along with the file, so failing to flush it does not matter.
        with contextlib.suppress(OSError, ValueError):
            self._writer.close()
        self._file.abandon()


def kept_array(values: list[Any], field: pa.Field) -> pa.Array:
    """The values of a kept column as an Arrow array, of the type that `stored_schema` gives it.

    Raises:
        InputError: a value does not have the column's type.
    """
    kind = _stored_type(field.type)
    if kind != field.type:
        values = [_stored_value(value, field.type) for value in values]
    try:
        return pa.array(values, type=kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"cannot keep the source's column {field.name} as type {kind}: {error}") from error


def stored_schema(kept: pa.Schema) -> pa.Schema:
    """The schema of kept columns as Parquet can store it: objects that are `{}` in every row become nulls.

    Raises:
        InputError: Parquet has no such type.
    """
    stored = [field.with_type(_stored_type(field.type)) for field in kept]
    for field in stored:
        try:
            _leaves(pa.schema([field]))
        except pa.ArrowNotImplementedError as error:
            raise InputError(
                f"cannot keep the source's column {field.name} of type {field.type}: {error}. Leave it out of "
                "keep_columns"
            ) from error
    return pa.schema(stored)


def _stored_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return pa.struct([field.with_type(_stored_type(field.type)) for field in fields]) if fields else pa.null()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_stored_type(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_stored_type(kind.value_type)))
    return kind


def _stored_value(value: Any, kind: pa.DataType) -> Any:
    if value is None or (pa.types.is_struct(kind) and kind.num_fields == 0):
        return None
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return {field.name: _stored_value(value.get(field.name), field.type) for field in fields}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_stored_value(item, kind.value_type) for item in value]
    return value


def value_bytes(value: Any) -> int:
    """About how many bytes a kept value takes."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(value_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(value_bytes, value))
    return 8


def _leaves(schema: pa.Schema) -> list[str]:
    """The paths of a schema's leaf columns in Parquet."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema) as writer:
        writer.write_table(schema.empty_table())
    columns = pq.ParquetFile(sink).schema
    return [columns.column(index).path for index in range(len(columns))]
