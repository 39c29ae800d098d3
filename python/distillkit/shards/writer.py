"""Writing a dataset: whole shards only, the manifest last."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distillkit.errors import CorruptDataError, InputError
from distillkit.fidelity import FidelityStats
from distillkit.shards.files import TEMPORARY_PREFIX, file_hash, publish, temporary_path
from distillkit.shards.header import Header
from distillkit.shards.manifest import Manifest, ShardInfo, merged_fidelity, read_manifest
from distillkit.shards.reader import ShardFile
from distillkit.shards.table import SCHEMA, check_document, document_id, document_table
from distillkit.types import Document, SparseLogprobs

__all__ = ["ShardWriter", "whole_shards"]

_ROW_GROUP_BYTES = 4 << 20
"""Teacher bytes of a row group: what random access reads at a time."""
_SHARD_NAME = re.compile(r"data-(\d{5,})\.parquet")


def whole_shards(folder: str | Path) -> list[tuple[ShardInfo, Header]]:
    """The shards that an interrupted capture left in a folder, in order, each with its header.

    Raises:
        CorruptDataError: one is damaged, or one is missing between others.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.glob("data-*.parquet") if _SHARD_NAME.fullmatch(path.name))
    found = []
    for number, path in enumerate(paths):
        if path.name != _shard_name(number):
            raise CorruptDataError(f"{folder}: {_shard_name(number)} is missing, but {path.name} is there")
        found.append((_shard_info(path), ShardFile(str(path)).header))
    return found


def _shard_name(number: int) -> str:
    return f"data-{number:05}.parquet"


def _shard_info(path: Path) -> ShardInfo:
    shard = ShardFile(str(path))
    with open(path, "rb") as file:
        digest = file_hash(file)
    return ShardInfo(path.name, shard.documents, shard.tokens, shard.rows, path.stat().st_size, digest)


class ShardWriter:
    """Writes documents into the shards of a dataset's folder.

    As a context manager it finishes the dataset on success. On an exception the shard in work is removed, whole
    shards stay, and there is
    no manifest: the folder is that of an interrupted capture, which `resume=True` continues.

    Equal documents and settings give equal files: nothing in them depends on the time or the machine.

    Args:
        folder: made if it does not exist.
        header: of every shard; its `fidelity` is measured here and must be None.
        shard_tokens: a shard is finished once it has at least this many tokens.
        resume: go on after the whole shards in the folder; without it the folder must have none.

    Attributes:
        resumed: the shards that were there.

    Raises:
        InputError: the folder holds shards or a finished dataset already.
        MismatchError: its shards have another header.
        CorruptDataError: its shards are damaged.
    """

    def __init__(
        self, folder: str | Path, header: Header, *, shard_tokens: int = 262_144, resume: bool = False
    ) -> None:
        if header.fidelity is not None:
            raise InputError("a writer measures fidelity itself: pass a header without")
        self._folder = Path(folder)
        self._header = header
        self._codec = header.make_codec()
        self._shard_tokens = shard_tokens
        self._folder.mkdir(parents=True, exist_ok=True)
        self._shards, self._headers = self._existing(resume)
        self.resumed: tuple[ShardInfo, ...] = tuple(self._shards)
        for leftover in self._folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink()
        self._open: _OpenShard | None = None
        self._manifest: Manifest | None = None

    def _existing(self, resume: bool) -> tuple[list[ShardInfo], list[Header]]:
        if read_manifest(self._folder) is not None:
            raise InputError(f"{self._folder}: holds a finished dataset; choose another folder or remove it")
        found = whole_shards(self._folder)
        if found and not resume:
            raise InputError(
                f"{self._folder}: holds {len(found)} shards of an unfinished dataset; resume it, choose another folder "
                "or remove them"
            )
        for info, header in found:
            self._header.check_same(header, where=str(self._folder / info.file))
        return [info for info, _ in found], [header for _, header in found]

    def write(
        self,
        input_ids: npt.NDArray[Any],
        teacher: SparseLogprobs | bytes,
        *,
        loss_mask: npt.NDArray[np.bool_] | None = None,
        segment_lengths: npt.NDArray[Any] | None = None,
    ) -> None:
        """Adds a document, and finishes the shard where that makes it large enough.

        Args:
            input_ids: (L,) integers.
            teacher: the distributions of its rows, numpy (R, k), which are encoded and compared with what they decode
            to; or bytes that the
                codec has already made, whose fidelity is then not known.
            loss_mask: (L,) bool.
            segment_lengths: (S,) integers, lengths of packed documents.

        Raises:
            InputError: wrong values or shapes, or a number of rows that the header's alignment does not give.
            OSError: the file can not be written (a full disk, for example); whole shards stay.
        """
        ids = np.ascontiguousarray(input_ids, dtype=np.int32)
        rows = self._header.rows_of(len(ids))
        if isinstance(teacher, SparseLogprobs) and len(teacher.ids) != rows:
            raise InputError(
                f"a document of {len(ids)} tokens has {rows} rows (alignment {self._header.alignment['rows']}), got "
                f"{len(teacher.ids)}"
            )
        stats = FidelityStats()
        data = teacher if isinstance(teacher, bytes) else self._encode(teacher, rows, stats)
        lengths = None if segment_lengths is None else np.ascontiguousarray(segment_lengths, dtype=np.int32)
        document = Document(document_id(ids, loss_mask, lengths), ids, data, rows, loss_mask, lengths)
        try:
            check_document(document, self._header, self._codec, "the document")
        except CorruptDataError as error:
            raise InputError(str(error)) from None
        if self._open is None:
            self._open = _OpenShard(self._folder / _shard_name(len(self._shards)))
        self._open.add(document, None if isinstance(teacher, bytes) else stats)
        if self._open.tokens >= self._shard_tokens:
            self.finish_shard()

    def _encode(self, teacher: SparseLogprobs, rows: int, stats: FidelityStats) -> bytes:
        data = self._codec.encode_document(teacher)
        # The codec sorts rows that are not; the comparison needs the same order.
        order = np.argsort(-np.asarray(teacher.logprobs), axis=-1, kind="stable")
        original = SparseLogprobs(
            np.take_along_axis(np.asarray(teacher.ids), order, -1),
            np.take_along_axis(np.asarray(teacher.logprobs), order, -1),
        )
        stats.update(original, self._codec.decode_document(data, rows))
        return data

    def finish_shard(self) -> None:
        """Makes what was written so far a whole shard; nothing if there is none."""
        if self._open is None:
            return
        shard, self._open = self._open, None
        header = replace(self._header, fidelity=shard.fidelity())
        self._shards.append(shard.finish(header))
        self._headers.append(header)

    def close(self) -> Manifest:
        """Finishes the last shard and writes the manifest; closing again changes nothing.

        Raises:
            InputError: no document was written.
        """
        if self._manifest is not None:
            return self._manifest
        self.finish_shard()
        if not self._shards:
            raise InputError(f"{self._folder}: no documents were written, so there is no dataset")
        manifest = Manifest(replace(self._header, fidelity=merged_fidelity(self._headers)), tuple(self._shards))
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


class _OpenShard:
    """The shard in work: a temporary file, and the documents of its next row group."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] = open(temporary_path(path), "wb")  # noqa: SIM115 — closed by finish or abort
        self._writer = pq.ParquetWriter(
            self._file,
            SCHEMA,
            # Packed bytes do not compress; ids and masks do.
            compression={name: "none" if name in ("teacher", "checksum") else "zstd" for name in _LEAVES},
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        self._pending: list[Document] = []
        self._pending_bytes = 0
        self._stats: FidelityStats | None = FidelityStats()
        self.documents = self.tokens = self.rows = 0

    def add(self, document: Document, stats: FidelityStats | None) -> None:
        if stats is None:
            self._stats = None
        elif self._stats is not None:
            self._stats.merge(stats)
        self._pending.append(document)
        self._pending_bytes += len(document.teacher)
        self.documents += 1
        self.tokens += len(document.input_ids)
        self.rows += document.num_rows
        if self._pending_bytes >= _ROW_GROUP_BYTES:
            self._write_row_group()

    def fidelity(self) -> dict[str, Any] | None:
        return None if self._stats is None else self._stats.to_dict()

    def _write_row_group(self) -> None:
        if self._pending:
            with self._saying_which_file():
                self._writer.write_table(document_table(self._pending, SCHEMA), row_group_size=len(self._pending))
            self._pending, self._pending_bytes = [], 0

    def finish(self, header: Header) -> ShardInfo:
        self._write_row_group()
        with self._saying_which_file():
            self._writer.add_key_value_metadata(header.to_metadata())
            self._writer.close()
            publish(self._file, self._path)
        with open(self._path, "rb") as file:
            digest = file_hash(file)
        size = self._path.stat().st_size
        return ShardInfo(self._path.name, self.documents, self.tokens, self.rows, size, digest)

    def abort(self) -> None:
        # What is buffered is thrown away with the file; that it can not be written either is no news.
        with contextlib.suppress(OSError):
            self._file.close()
        temporary_path(self._path).unlink(missing_ok=True)

    def _saying_which_file(self) -> _WriteErrors:
        return _WriteErrors(self)


class _WriteErrors:
    """Says which file could not be written and what is kept, and removes the incomplete one."""

    def __init__(self, shard: _OpenShard) -> None:
        self._shard = shard

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (OSError, pa.ArrowException)):
            self._shard.abort()
            number = error.errno if isinstance(error, OSError) else None
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            message = f"{reason}; the shard in work is lost, finished shards are kept: run again to go on after them"
            raise OSError(number or 5, message, str(self._shard._path)) from error


_LEAVES = [
    "doc_id",
    "input_ids.list.element",
    "teacher",
    "checksum",
    "loss_mask.list.element",
    "segment_lengths.list.element",
]
