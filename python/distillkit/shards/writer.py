"""Writing a dataset: whole shards only, the manifest last."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from distillkit.errors import CorruptDataError, InputError
from distillkit.fidelity import FidelityStats
from distillkit.shards.files import TEMPORARY_PREFIX, file_hash, publish, temporary_path, writing
from distillkit.shards.header import Header
from distillkit.shards.manifest import Manifest, ShardInfo, merged_fidelity, read_manifest
from distillkit.shards.reader import ShardFile
from distillkit.shards.table import SCHEMA, GroupDigest, check_document, document_id, document_table, int32_array
from distillkit.types import Document, SparseLogprobs

__all__ = ["ShardWriter", "whole_shards"]

_ROW_GROUP_BYTES = 1 << 20
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
        shard = ShardFile(str(path))
        with open(path, "rb") as file:
            found.append((replace(shard.info(), xxh3_128=file_hash(file)), shard.header))
    return found


def _shard_name(number: int) -> str:
    return f"data-{number:05}.parquet"


class ShardWriter:
    """Writes documents into the shards of a dataset's folder.

    As a context manager it finishes the dataset on success. On an exception the shard in work is removed, whole
    shards stay, and there is no manifest: the folder is that of an interrupted capture, which `resume=True` continues.

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
        self._failed = False

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
        teacher: SparseLogprobs | bytes | bytearray | memoryview,
        *,
        loss_mask: npt.NDArray[Any] | None = None,
        segment_lengths: npt.NDArray[Any] | None = None,
    ) -> None:
        """Adds a document, and finishes the shard where that makes it large enough.

        Args:
            input_ids: (L,) integers.
            teacher: the distributions of its rows, numpy (R, k), which are encoded and compared with what they decode
                to; or bytes that the codec has already made, whose fidelity is then not known.
            loss_mask: (L,) bool, or 0 and 1.
            segment_lengths: (S,) integers, lengths of packed documents.

        Raises:
            InputError: wrong values or shapes, or a number of rows that the header's alignment does not give.
            OSError: the file can not be written (a full disk, for example); whole shards stay, and this writer writes
                no more.
        """
        self._check_usable()
        ids = int32_array(input_ids, "input_ids")
        lengths = None if segment_lengths is None else int32_array(segment_lengths, "segment_lengths")
        mask = None if loss_mask is None else _mask(loss_mask)
        rows = self._header.rows_of(len(ids))
        stats: FidelityStats | None = None
        if isinstance(teacher, SparseLogprobs):
            data, stats = self._encode(teacher, rows, len(ids))
        else:
            data = bytes(teacher)
        document = Document(document_id(ids, mask, lengths), ids, data, rows, mask, lengths)
        try:
            check_document(document, self._header, self._codec, "the document")
        except CorruptDataError as error:
            raise InputError(str(error)) from None
        with self._failing():
            if self._open is None:
                self._open = _OpenShard(self._folder / _shard_name(len(self._shards)))
            self._open.add(document, stats)
        if self._open.tokens >= self._shard_tokens:
            self.finish_shard()

    def _encode(self, teacher: SparseLogprobs, rows: int, tokens: int) -> tuple[bytes, FidelityStats]:
        if len(teacher.ids) != rows:
            raise InputError(
                f"a document of {tokens} tokens has {rows} rows (alignment {self._header.alignment['rows']}), got "
                f"{len(teacher.ids)}"
            )
        data = self._codec.encode_document(teacher)
        # The codec sorts rows that are not; the comparison needs the same order.
        order = np.argsort(-np.asarray(teacher.logprobs), axis=-1, kind="stable")
        original = SparseLogprobs(
            np.take_along_axis(np.asarray(teacher.ids), order, -1),
            np.take_along_axis(np.asarray(teacher.logprobs), order, -1),
        )
        stats = FidelityStats()
        stats.update(original, self._codec.decode_document(data, rows))
        return data, stats

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
            raise InputError(f"{self._folder}: an earlier write failed; go on with a new writer and resume=True")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Where something can not be written, documents are lost: nothing may be built on what is left."""
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
            raise InputError(f"{self._folder}: no documents were written, so there is no dataset")
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


def _mask(loss_mask: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    mask = np.asarray(loss_mask)
    if mask.dtype != np.bool_ and not (mask.dtype.kind in "iu" and np.isin(mask, (0, 1)).all()):
        raise InputError(
            f"loss_mask must be bool, or 0 and 1; got {mask.dtype} with values such as {mask[:8].tolist()}"
        )
    return mask.astype(np.bool_)


class _OpenShard:
    """The shard in work: a temporary file, and the documents of its next row group."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
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
        self._groups: list[GroupDigest] = []
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
        if not self._pending:
            return
        table = document_table(self._pending)
        with writing(self._path):
            self._writer.write_table(table, row_group_size=len(self._pending))
        self._groups.append(GroupDigest.of(table))
        self._pending, self._pending_bytes = [], 0

    def finish(self, header: Header) -> ShardInfo:
        self._write_row_group()
        with writing(self._path):
            self._writer.add_key_value_metadata({**header.to_metadata(), **GroupDigest.to_metadata(self._groups)})
            self._writer.close()
            publish(self._file, self._path)
        with open(self._path, "rb") as file:
            digest = file_hash(file)
        size = self._path.stat().st_size
        return ShardInfo(self._path.name, self.documents, self.tokens, self.rows, size, digest)

    def abort(self) -> None:
        # What is buffered is thrown away with the file; that it can not be written either is no news.
        with contextlib.suppress(OSError, ValueError):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._file.close()
        temporary_path(self._path).unlink(missing_ok=True)


_LEAVES = [
    "doc_id",
    "input_ids.list.element",
    "teacher",
    "checksum",
    "loss_mask.list.element",
    "segment_lengths.list.element",
]
