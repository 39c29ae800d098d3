"""Reading datasets: ours and published ones, by document, with random access."""

from __future__ import annotations

import bisect
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distillkit.codec import Codec, CodecConfig
from distillkit.errors import CorruptDataError, InputError, MismatchError
from distillkit.shards.header import Header, check_codec
from distillkit.shards.manifest import MANIFEST, Manifest, ShardInfo, read_manifest
from distillkit.shards.parquet import open_parquet
from distillkit.shards.published import load_codec_config, open_published
from distillkit.shards.storage import reading
from distillkit.shards.table import SCHEMA, Block, Documents, GroupDigest, ShardRows
from distillkit.types import Document, SparseLogprobs

__all__ = ["Dataset", "DocumentFile", "ShardFile", "is_captured"]

_CACHED_GROUPS = {"distillkit": 8, "published": 1}
"""Row groups kept in memory: ours are about 1 MB, published ones can be a thousand times larger."""

_GROUPS_AT_A_TIME = 16
"""Row groups whose columns (but for the teacher's bytes) are read by one call."""


class DocumentFile(Protocol):
    """A file of documents, in groups that are read at a time."""

    path: str
    header: Header

    @property
    def groups(self) -> Sequence[int]:
        """How many documents each group has."""

    def load(self, group: int) -> Documents:
        """The documents of one group; each is checked when it is taken."""

    def __iter__(self) -> Iterator[Document]:
        """All documents in order."""

    def blocks(self) -> Iterator[Block]:
        """All documents in order, some thousand rows at a time."""

    def info(self) -> ShardInfo:
        """What the file holds."""

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, without reading the teacher's bytes."""


class ShardFile:
    """One of our shards. No file stays open: each read opens it, with the metadata that was checked here.

    Raises:
        FileNotFoundError: it is not there.
        TruncatedDataError, CorruptDataError, UnsupportedVersionError: it is damaged or of another version.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with open_parquet(path) as parquet:
            self._metadata, schema = parquet.metadata, parquet.schema_arrow
            self.header = Header.from_metadata(self._metadata.metadata, where=path)
            self._digests = GroupDigest.from_metadata(self._metadata.metadata, where=path)
            stored = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        self._groups = [digest.documents for digest in self._digests]
        self._starts = list(itertools.accumulate(self._groups, initial=0))
        if stored != self._groups or self._metadata.num_rows != sum(stored):
            raise CorruptDataError(
                f"{path}: row groups of {stored} documents, {self._metadata.num_rows} in total, expected {self._groups}"
            )
        self._columns = [name for name in SCHEMA.names if name in schema.names]
        for field in SCHEMA:
            found = schema.field(field.name).type if field.name in schema.names else None
            if found != field.type and not (found is None and field.nullable):
                raise CorruptDataError(f"{path}: column {field.name} is {found or 'missing'}, expected {field.type}")
        self._codec = self.header.make_codec()

    @property
    def groups(self) -> Sequence[int]:
        return self._groups

    @property
    def documents(self) -> int:
        return self._starts[-1]

    def load(self, group: int) -> ShardRows:
        (documents,) = self._read(range(group, group + 1))
        return documents

    def __iter__(self) -> Iterator[Document]:
        return itertools.chain.from_iterable(self._read(range(len(self._groups))))

    def blocks(self) -> Iterator[Block]:
        return (documents.block() for documents in self._read(range(len(self._groups))))

    def _read(self, groups: range) -> Iterator[ShardRows]:
        """The documents of some groups, in order."""
        names = [name for name in self._columns if name != "teacher"]
        with open_parquet(self.path, self._metadata) as parquet:
            for start in range(groups.start, groups.stop, _GROUPS_AT_A_TIME):
                run = range(start, min(start + _GROUPS_AT_A_TIME, groups.stop))
                with reading(self._where(run)):
                    table = parquet.read_row_groups(list(run), columns=names, use_threads=False)
                for group in run:
                    part = table.slice(self._starts[group] - self._starts[start], self._groups[group])
                    yield self._with_teacher(group, part, parquet)

    def _with_teacher(self, group: int, table: pa.Table, parquet: pq.ParquetFile) -> ShardRows:
        """The documents of a group of which all other columns have been read."""
        where = self._where(range(group, group + 1))
        with reading(where):
            teacher = parquet.read_row_group(group, columns=["teacher"], use_threads=False)
            table = table.append_column(SCHEMA.field("teacher"), teacher.column("teacher"))
            found = GroupDigest.of(table)
        if found != self._digests[group]:
            raise CorruptDataError(f"{where}: the documents are not those that were written, or are in another order")
        return ShardRows(table, self.header, self._codec, self.path, self._starts[group])

    def _where(self, groups: range) -> str:
        return f"{self.path}, documents {self._starts[groups.start]} to {self._starts[groups.stop] - 1}"

    def info(self) -> ShardInfo:
        """Counts by the lengths of `input_ids`."""
        lengths = self.lengths().tolist()
        rows = sum(self.header.rows_of(length) for length in lengths)
        filesystem, inner = fsspec.core.url_to_fs(self.path)
        name = self.path.rsplit("/", 1)[-1]
        return ShardInfo(name, self.documents, sum(lengths), rows, filesystem.size(inner), "")

    def lengths(self) -> npt.NDArray[np.int64]:
        """(D,) tokens of each document."""
        with open_parquet(self.path, self._metadata) as parquet:
            column = parquet.read(columns=["input_ids"], use_threads=False).column("input_ids")
        parts = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
        return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)


class Dataset(Documents):
    """Documents by index, in the order they were captured. Made by `Dataset.open`.

    Safe in forked and spawned workers. Keeps a few row groups in memory, so neighbours are cheap.

    Attributes:
        path: what was opened.
        kind: "distillkit" for our shards, "published" for published datasets.
        header: what is known about the data; of a published dataset only codec, sizes and alignment.
        codec: decodes the documents' teacher bytes.

    Example:
        >>> from distillkit.shards import Dataset
        >>> dataset = Dataset.open("captured")
        >>> len(dataset), dataset.num_tokens, dataset.codec.k
        (3, 30, 50)
        >>> document = dataset[-1]
        >>> document.input_ids.shape, document.num_rows
        ((10,), 9)
        >>> dataset.codec.decode_document(document.teacher, document.num_rows).ids.shape
        (9, 50)
    """

    def __init__(self, path: str, kind: str, header: Header, files: Sequence[DocumentFile], shards: Any = None) -> None:
        self.path, self.kind, self.header = path, kind, header
        self.codec: Codec = header.make_codec()
        self._files = list(files)
        self._shards: tuple[ShardInfo, ...] | None = shards
        groups = [(file, group) for file in self._files for group in range(len(file.groups))]
        self._groups = groups
        self._ends = list(itertools.accumulate(file.groups[group] for file, group in groups))
        self._cache: OrderedDict[int, Documents] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    @staticmethod
    def open(
        path: str | os.PathLike[str],
        *,
        config: CodecConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        split: str | None = None,
        vocab_size: int | None = None,
    ) -> Dataset:
        """Opens a dataset.

        Args:
            path: a captured dataset's folder, one shard, a published dataset's folder of Parquet files or
            `save_to_disk` folder, or one of its
                files; a path or an fsspec URL.
            config: the codec of a published dataset: a YAML file, a mapping or a configuration. Without it the
                `compression_config.yaml` beside the data is taken. A dataset that names its codec (our shards, or that
                file) must agree with one given here.
            split: of a published dataset that has splits.
            vocab_size: of a published dataset of plain top-k columns (`token_ids`, `top_values`), which does not say
                it; other datasets know theirs.

        Raises:
            FileNotFoundError: nothing is there.
            InputError: what is there is no dataset, or an unfinished one.
            MismatchError: `config` and the shards, or the shards and their manifest, disagree.
            ConfigError, CorruptDataError, TruncatedDataError, UnsupportedVersionError: as they say.
        """
        name = str(os.fspath(path)).rstrip("/")
        filesystem, inner = fsspec.core.url_to_fs(name)
        if not filesystem.exists(inner):
            raise FileNotFoundError(2, "no such file or folder", name)
        manifest = read_manifest(name) if filesystem.isdir(inner) else None
        if manifest is not None:
            dataset = _open_folder(name, manifest)
        elif _is_shard(name):
            shard = ShardFile(name)
            dataset = Dataset(name, "distillkit", shard.header, [shard])
        else:
            header, files = open_published(name, config, split, vocab_size)
            return Dataset(name, "published", header, files)
        if config is not None:
            given = Codec(load_codec_config(config))
            check_codec(given, dataset.codec, name, "its codec")
        if split not in (None, "train"):
            raise InputError(f"{name}: a captured dataset has no splits, but split {split!r} was asked for")
        return dataset

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The files in order."""
        if self._shards is None:
            self._shards = tuple(file.info() for file in self._files)
        return self._shards

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_rows(self) -> int:
        """Rows of all documents."""
        return sum(shard.rows for shard in self.shards)

    def lengths(self) -> npt.NDArray[np.int64]:
        """(D,) tokens of each document, read from the column of token ids alone, some files at a time.

        Raises:
            CorruptDataError: a file cannot be read.
        """
        with ThreadPoolExecutor() as pool:
            return np.concatenate([np.empty(0, np.int64), *pool.map(lambda file: file.lengths(), self._files)])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        if not isinstance(index, (int, np.integer)):
            raise TypeError(f"a document's index is an integer, got {type(index).__name__}")
        position = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= position < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        group = bisect.bisect_right(self._ends, position)
        return self._load(group)[position - (self._ends[group - 1] if group else 0)]

    def _load(self, group: int) -> Documents:
        if group in self._cache:
            self._cache.move_to_end(group)
        else:
            while len(self._cache) >= _CACHED_GROUPS[self.kind]:
                self._cache.popitem(last=False)
            file, number = self._groups[group]
            self._cache[group] = file.load(number)
        return self._cache[group]

    def __iter__(self) -> Iterator[Document]:
        return itertools.chain.from_iterable(self._files)

    def blocks(self) -> Iterator[Block]:
        """All documents in order, some thousand rows at a time: the quickest way to read a dataset.

        `Block.decode` decodes the rows of a block with one call; `Block.tensor` gives their bytes to torch without a
        copy, to be decoded on a device by `codec.decode_torch`.

        Raises (while iterating):
            CorruptDataError: as indexing.
        """
        return itertools.chain.from_iterable(file.blocks() for file in self._files)

    def decoded(self) -> Iterator[tuple[Document, SparseLogprobs]]:
        """All documents in order, each with the rows of its teacher, numpy (R, k): views into those of its block.

        Raises (while iterating):
            CorruptDataError: as indexing and `Codec.decode`.
        """
        for block in self.blocks():
            rows = block.decode()
            for document, end in zip(block.documents, block.ends.tolist(), strict=True):
                part = slice(end - document.num_rows, end)
                yield document, SparseLogprobs(rows.ids[part], rows.logprobs[part])

    @property
    def files(self) -> Sequence[DocumentFile]:
        """The files behind `shards`."""
        return self._files


def is_captured(path: str | os.PathLike[str]) -> bool:
    """Whether something that exists is a captured dataset, or one of its shards.

    Raises:
        InputError: it is the folder of an unfinished capture.
        CorruptDataError: its manifest is damaged.
    """
    name = str(os.fspath(path)).rstrip("/")
    filesystem, inner = fsspec.core.url_to_fs(name)
    return (filesystem.isdir(inner) and read_manifest(name) is not None) or _is_shard(name)


def _is_shard(name: str) -> bool:
    """Whether a file has our header; a folder with such files but without a manifest is refused here."""
    filesystem, inner = fsspec.core.url_to_fs(name)
    if not filesystem.isdir(inner):
        return name.endswith(".parquet") and _has_header(name)
    shards = sorted(filesystem.glob(f"{inner}/data-*.parquet"))
    if shards and _has_header(f"{name}/{Path(shards[0]).name}"):
        raise InputError(
            f"{name}: {len(shards)} shards but no {MANIFEST}: the capture is unfinished; run it again to resume it, "
            "or open a single shard"
        )
    return False


def _has_header(name: str) -> bool:
    with open_parquet(name) as parquet:
        metadata = parquet.metadata.metadata or {}
    # One of them may be damaged.
    return any(key.startswith(b"distillkit.") for key in metadata)


def _open_folder(name: str, manifest: Manifest) -> Dataset:
    filesystem, inner = fsspec.core.url_to_fs(name)
    present = {Path(path).name for path in filesystem.glob(f"{inner}/data-*.parquet")}
    listed = [shard.file for shard in manifest.shards]
    for what, names in (("missing", sorted(set(listed) - present)), ("not in it", sorted(present - set(listed)))):
        if names:
            raise MismatchError(f"{name}: {MANIFEST} lists {len(listed)} shards, but {', '.join(names[:5])} is {what}")
    files = []
    for shard in manifest.shards:
        file = ShardFile(f"{name}/{shard.file}")
        size = filesystem.size(f"{inner}/{shard.file}")
        if size != shard.bytes or file.documents != shard.documents:
            raise MismatchError(
                f"{name}/{shard.file}: {size} bytes and {file.documents} documents, but {MANIFEST} says {shard.bytes} "
                f"and {shard.documents}: the files belong to different captures"
            )
        manifest.header.check_same(file.header, where=file.path)
        files.append(file)
    return Dataset(name, "distillkit", manifest.header, files, manifest.shards)
