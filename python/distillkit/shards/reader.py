"""Reads datasets, captured and published, by document and with random access."""

from __future__ import annotations

import bisect
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distillkit.codec import Codec, CodecConfig, Prior
from distillkit.configuration.urls import is_on_hub, locate, without_trailing_slash
from distillkit.errors import CorruptDataError, InputError, MismatchError, UnsupportedVersionError
from distillkit.shards.footer import Chunk
from distillkit.shards.header import Header, check_codec
from distillkit.shards.manifest import MANIFEST, Manifest, ShardInfo, read_manifest
from distillkit.shards.parquet import check_names, footer_of, open_parquet, validated
from distillkit.shards.prior import PRIOR, find_prior
from distillkit.shards.published import load_codec_config, open_published
from distillkit.shards.storage import Folder, missing_file, reading
from distillkit.shards.table import GROUPS_KEY, SCHEMA, Block, Documents, GroupDigest, KeptRows, ShardRows
from distillkit.types import Document, Facts, Shown, SparseLogprobs

__all__ = ["Dataset", "DocumentFile", "ShardFile", "is_captured"]

_CACHED_GROUPS = {"distillkit": 8, "published": 1}
"""Row groups kept in memory. Ours are about 1 MB; published ones can be a thousand times larger."""

_GROUPS_AT_A_TIME = 16
"""Row groups whose columns, except the teacher's bytes, are read in one call."""

_SMALL_GROUP, _MOST_EXPANSION = 1 << 26, 16
"""A row group takes at most so many bytes in memory, plus so many times its size in the file. Those that the writer
makes expand less than twice; a few bytes of a crafted file can stand for gigabytes."""

_WIDTHS = {"input_ids": 4, "checksum": 8, "loss_mask": 1, "segment_lengths": 4, "label_logprobs": 4}
_WITHOUT_REPEATS = {"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"}
"""Encodings under which values take no more memory than their decompressed bytes."""


class DocumentFile(Protocol):
    """A file of documents, in groups that are each read at once."""

    path: str
    header: Header

    @property
    def groups(self) -> Sequence[int]:
        """Number of documents in each group."""

    def load(self, group: int) -> Documents:
        """The documents of one group, each checked on access."""

    def __iter__(self) -> Iterator[Document]:
        """All documents in order."""

    def blocks(self) -> Iterator[Block]:
        """All documents in order, in blocks of a few thousand rows."""

    def info(self) -> ShardInfo:
        """File name, counts and size."""

    def lengths(self) -> npt.NDArray[np.int64]:
        """(D,) int64 tokens per document, without reading the teacher's bytes."""


class ShardFile:
    """A captured dataset's shard. It does not stay open: each read opens it, with the metadata checked here.

    Args:
        path: a path or an fsspec URL.
        prior: the prior of its codec, if already read; else it is read from the shard's footer, or beside the shard.

    Raises:
        FileNotFoundError: the file does not exist.
        TruncatedDataError, CorruptDataError, UnsupportedVersionError: it is damaged, or of an unsupported version.
    """

    def __init__(self, path: str, prior: Prior | None = None) -> None:
        self.path = path
        with open_parquet(path, any_size=True) as parquet:
            self._metadata, schema = parquet.metadata, parquet.schema_arrow
            self.header = Header.from_metadata(self._metadata.metadata, where=path)
            self._digests = GroupDigest.from_metadata(self._metadata.metadata, where=path)
            self.groups_xxh3 = self._metadata.metadata[GROUPS_KEY + b".xxh3"].decode()
            leaves = [parquet.schema.column(i).path.split(".")[0] for i in range(len(parquet.schema))]
            self._leaves = [(i, name) for i, name in enumerate(leaves) if name in SCHEMA.names]
            stored = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        # Read when first needed; pyarrow's own columns end the process if a damaged footer contradicts its schema.
        self._footer: list[list[Chunk]] | None = None
        self._groups = [digest.documents for digest in self._digests]
        self._starts = list(itertools.accumulate(self._groups, initial=0))
        if stored != self._groups or self._metadata.num_rows != sum(stored):
            raise CorruptDataError(
                f"{path}: row groups of {stored} documents, {self._metadata.num_rows} in total, expected {self._groups}"
            )
        check_names(schema, SCHEMA.names, path)
        self._columns = [name for name in SCHEMA.names if name in schema.names]
        self.kept_schema = pa.schema([field for field in schema if field.name not in SCHEMA.names])
        self._kept = self.kept_schema.names
        for field in SCHEMA:
            found = schema.field(field.name).type if field.name in schema.names else None
            if found != field.type and not (found is None and field.nullable):
                raise CorruptDataError(f"{path}: column {field.name} is {found or 'missing'}, expected {field.type}")
        if prior is None or prior.hash != self.header.prior:
            prior = find_prior(self.header, self._metadata.metadata, path)
        try:
            self.codec = self.header.make_codec(prior)
        except (CorruptDataError, UnsupportedVersionError) as error:
            raise type(error)(f"{path}: {error}") from error

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
        """Reads the documents of a range of groups, in order."""
        names = [name for name in self._columns if name != "teacher"]
        with open_parquet(self.path, self._metadata) as parquet:
            for run in self._runs(groups, _GROUPS_AT_A_TIME):
                with reading(self._where(run)):
                    table = parquet.read_row_groups(list(run), columns=names, use_threads=False)
                for group in run:
                    part = table.slice(self._starts[group] - self._starts[run.start], self._groups[group])
                    yield self._with_teacher(group, part, parquet)

    def _with_teacher(self, group: int, table: pa.Table, parquet: pq.ParquetFile) -> ShardRows:
        """Completes a group, whose other columns have been read, with the teacher's bytes, and checks its digest."""
        where = self._where(range(group, group + 1))
        with reading(where):
            teacher = parquet.read_row_group(group, columns=["teacher"], use_threads=False)
            table = table.append_column(SCHEMA.field("teacher"), teacher.column("teacher"))
            if GroupDigest.of(table) != self._digests[group]:
                raise CorruptDataError(f"{where}: the documents or their order differ from what was written")
            kept = KeptRows(self._kept, partial(self._kept_rows, group)) if self._kept else None
            return ShardRows(table, self.header, self.codec, self.path, self._starts[group], kept)

    def _kept_rows(self, group: int) -> list[dict[str, Any]]:
        """The kept columns of a group's documents."""
        # Without the metadata, opening it refuses a few bytes that stand for gigabytes.
        with open_parquet(self.path) as parquet, reading(self._where(range(group, group + 1))):
            table = validated(parquet.read_row_group(group, columns=self._kept, use_threads=False), self.path)
            if len(table) != self._groups[group]:
                raise CorruptDataError(
                    f"{self.path}: {len(table)} rows in row group {group}, expected {self._groups[group]}"
                )
            rows: list[dict[str, Any]] = table.to_pylist()
            return rows

    def _runs(self, groups: range, most: int) -> Iterator[range]:
        """Divides groups into runs that are read in one call: of at most so many, and small together."""
        start, total = groups.start, 0
        for group in groups:
            size = self._size(group)
            if group > start and (group - start == most or total + size > _SMALL_GROUP):
                yield range(start, group)
                start, total = group, 0
            total += size
        if start < groups.stop:
            yield range(start, groups.stop)

    def _size(self, group: int) -> int:
        """A group's bytes in memory, as its metadata declares them.

        Raises:
            CorruptDataError: they are far more than the bytes in the file.
        """
        inside = stored = 0
        for index, name in self._leaves:
            column = self._chunks()[group][index]
            stored += column.total_compressed_size
            if name in _WIDTHS:
                inside += column.num_values * _WIDTHS[name]
            else:
                repeats = column.has_dictionary_page or not {*column.encodings} <= _WITHOUT_REPEATS
                inside += column.total_uncompressed_size * (column.num_values if repeats else 1)
        if not 0 <= inside <= _SMALL_GROUP + _MOST_EXPANSION * stored:
            raise CorruptDataError(
                f"{self._where(range(group, group + 1))}: {inside:,} bytes in memory from {stored:,} in the file: not "
                "what distillkit writes"
            )
        return inside

    def _chunks(self) -> list[list[Chunk]]:
        """The columns of each row group, according to the footer.

        Raises:
            CorruptDataError: they contradict the schema.
        """
        if self._footer is None:
            footer = footer_of(self.path)
            if {len(columns) for columns in footer} - {self._metadata.num_columns}:
                raise CorruptDataError(f"{self.path}: the columns of its row groups contradict its schema")
            self._footer = footer
        return self._footer

    def _where(self, groups: range) -> str:
        return f"{self.path}, documents {self._starts[groups.start]} to {self._starts[groups.stop] - 1}"

    def teacher_bytes(self) -> int:
        """The codec's bytes of all documents, to within some tens of bytes per row group: from the footer."""
        at = next(index for index, name in self._leaves if name == "teacher")
        # A value is preceded by its length, in 4 bytes.
        return sum(group[at].total_uncompressed_size - 4 * group[at].num_values for group in self._chunks())

    def info(self) -> ShardInfo:
        """File name, counts and size. Reads the column `input_ids` only."""
        lengths = self.lengths().tolist()
        rows = sum(self.header.rows_of(length) for length in lengths)
        filesystem, inner = locate(self.path)
        name = self.path.rsplit("/", 1)[-1]
        return ShardInfo(name, self.documents, sum(lengths), rows, filesystem.size(inner), "", self.groups_xxh3)

    def lengths(self) -> npt.NDArray[np.int64]:
        """(D,) int64 tokens per document."""
        parts = [np.empty(0, np.int64)]
        with open_parquet(self.path, self._metadata) as parquet:
            for run in self._runs(range(len(self._groups)), len(self._groups)):
                column = parquet.read_row_groups(list(run), columns=["input_ids"], use_threads=False).column(0)
                parts += [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
        return np.concatenate(parts).astype(np.int64)


class Dataset(Documents, Shown):
    """Documents by index, in the order in which they were captured. Created by `Dataset.open`.

    Safe to use in forked and spawned workers. Caches a few row groups, so that access to neighbours is cheap.

    Attributes:
        path: the path that was opened.
        kind: "distillkit" for captured datasets, "published" for published ones.
        header: the dataset's header; for a published dataset, only codec, sizes and alignment are known.
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

    def __init__(
        self, path: str, kind: str, header: Header, codec: Codec, files: Sequence[DocumentFile], shards: Any = None
    ) -> None:
        self.path, self.kind, self.header, self.codec = path, kind, header, codec
        self._files = list(files)
        self._shards: tuple[ShardInfo, ...] | None = shards
        self._starts = list(itertools.accumulate(map(_documents_in, self._files), initial=0))
        self._ends: dict[int, list[int]] = {}
        self._cache: OrderedDict[tuple[int, int], Documents] = OrderedDict()

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
            path: path or fsspec URL of a captured dataset's folder or one of its shards, or of a published dataset's
                folder (of Parquet files, or from `save_to_disk`) or one of its files. A dataset on the hub is
                `hf://datasets/OWNER/NAME`, or `…/NAME@REVISION`: of a captured one, only the row groups that are used
                are downloaded.
            config: the codec of a published dataset, as a YAML file, a mapping or a configuration; by default the
                `compression_config.yaml` next to the data. If the dataset records its codec (in its shards or in that
                file), the two must agree.
            split: which split of a published dataset to open, if it has several.
            vocab_size: for a published dataset of plain top-k columns (`token_ids`, `top_values`), which does not
                record it; ignored for others.

        Raises:
            FileNotFoundError: `path` does not exist.
            InputError: it is not a dataset, or not a finished one.
            MismatchError: `config` and the shards, or the shards and their manifest, disagree.
            ConfigError: the codec configuration is missing or invalid.
            CorruptDataError, TruncatedDataError: a file is damaged.
            UnsupportedVersionError: a file is in a version that this release cannot read.
        """
        name = without_trailing_slash(path)
        filesystem, inner = locate(name)
        if not filesystem.exists(inner):
            raise missing_file(filesystem, inner, name)
        manifest = read_manifest(name) if filesystem.isdir(inner) else None
        if manifest is not None:
            dataset = _open_folder(name, manifest)
        elif _is_shard(name):
            shard = ShardFile(name)
            dataset = Dataset(name, "distillkit", shard.header, shard.codec, [shard])
        else:
            header, files = open_published(name, config, split, vocab_size)
            return Dataset(name, "published", header, header.make_codec(), files)
        if config is not None:
            check_codec(load_codec_config(config), dataset.codec, name, "its codec")
        if split not in (None, "train"):
            raise InputError(f"{name}: a captured dataset has no splits, but split {split!r} was requested")
        return dataset

    def facts(self) -> Facts:
        """What is shown of the dataset; nothing is read that is not known."""
        header = self.header
        rows = [("documents", f"{len(self):,}")]
        if self._shards is not None:
            rows.append(("tokens", f"{self.num_tokens:,}"))
            size = sum(shard.bytes for shard in self._shards)
            rows.append(("files", f"{len(self._files):,}, {size / 1e6:,.1f} MB"))
        rows += [
            ("teacher", str((header.teacher or {}).get("name", "not recorded"))),
            ("tokenizer", str((header.tokenizer or {}).get("name", "not recorded"))),
            ("codec", f"{self.codec.format}, {self.codec.k:,} ids per distribution"),
        ]
        return f"{'captured' if self.kind == 'distillkit' else 'published'} dataset {self.path}", rows

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """Name, counts and size of each file, in order."""
        if self._shards is None:
            self._shards = tuple(file.info() for file in self._files)
        return self._shards

    @property
    def num_tokens(self) -> int:
        """Total tokens of all documents."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_rows(self) -> int:
        """Total rows of all documents."""
        return sum(shard.rows for shard in self.shards)

    @property
    def kept_schema(self) -> pa.Schema:
        """The columns that a capture kept of the source's rows (`Document.columns`)."""
        first = self._files[0] if self._files else None
        return first.kept_schema if isinstance(first, (ShardFile, HubShard)) else pa.schema([])

    @property
    def teacher_bytes(self) -> int:
        """The codec's bytes of all documents; in the compact format, to within some tens of bytes per row group."""
        if self.codec.is_fixed:
            return self.num_rows * self.codec.bytes_per_token
        return sum(file.teacher_bytes() for file in self._files if isinstance(file, (ShardFile, HubShard)))

    def lengths(self) -> npt.NDArray[np.int64]:
        """(D,) int64 tokens per document, read from the token id column only, several files in parallel.

        Raises:
            CorruptDataError: a file cannot be read.
        """
        with ThreadPoolExecutor() as pool:
            return np.concatenate([np.empty(0, np.int64), *pool.map(lambda file: file.lengths(), self._files)])

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Document:
        if not isinstance(index, (int, np.integer)):
            raise TypeError(f"a document's index is an integer, got {type(index).__name__}")
        position = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= position < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number = bisect.bisect_right(self._starts, position, hi=len(self._files)) - 1
        inside = position - self._starts[number]
        if number not in self._ends:
            self._ends[number] = list(itertools.accumulate(self._files[number].groups))
        ends = self._ends[number]
        group = bisect.bisect_right(ends, inside)
        return self._load(number, group)[inside - (ends[group - 1] if group else 0)]

    def _load(self, number: int, group: int) -> Documents:
        """A group of a file, by their numbers."""
        key = (number, group)
        if key in self._cache:
            self._cache.move_to_end(key)
        else:
            while len(self._cache) >= _CACHED_GROUPS[self.kind]:
                self._cache.popitem(last=False)
            self._cache[key] = self._files[number].load(group)
        return self._cache[key]

    def decode(self, index: int) -> SparseLogprobs:
        """The teacher's distributions over a document, by its index: numpy (R, k), row t over token t + 1.

        Raises:
            IndexError: there is no such document.
            CorruptDataError: it is damaged.

        Example:
            >>> from distillkit.shards import Dataset
            >>> rows = Dataset.open("captured").decode(0)
            >>> rows.ids.shape, rows.logprobs.shape
            ((9, 50), (9, 50))
        """
        document = self[index]
        return self.codec.decode_document(document.teacher, document.num_rows)

    def __iter__(self) -> Iterator[Document]:
        return itertools.chain.from_iterable(self._files)

    def blocks(self) -> Iterator[Block]:
        """All documents in order, in blocks of a few thousand rows: the fastest way to read a dataset.

        `Block.decode` decodes a block's rows in one call; `Block.tensor` passes their bytes to torch without a copy, to
        be decoded on a device with `codec.decode_torch`.

        Raises (while iterating):
            CorruptDataError: as for indexing.
        """
        return itertools.chain.from_iterable(file.blocks() for file in self._files)

    def decoded(self) -> Iterator[tuple[Document, SparseLogprobs]]:
        """All documents in order, each with its decoded teacher rows, numpy (R, k): views into the rows of its block.

        Raises (while iterating):
            CorruptDataError: as for indexing and `Codec.decode`.
        """
        for block in self.blocks():
            rows = block.decode()
            for document, end in zip(block.documents, block.ends.tolist(), strict=True):
                part = slice(end - document.num_rows, end)
                yield document, SparseLogprobs(rows.ids[part], rows.logprobs[part], rows.draws)

    @property
    def files(self) -> Sequence[DocumentFile]:
        """The files behind `shards`."""
        return self._files


def is_captured(path: str | os.PathLike[str]) -> bool:
    """Whether an existing path is a captured dataset or one of its shards.

    Raises:
        InputError: the path is the folder of an unfinished capture.
        CorruptDataError: the manifest is damaged.
    """
    name = without_trailing_slash(path)
    filesystem, inner = locate(name)
    return (filesystem.isdir(inner) and read_manifest(name) is not None) or _is_shard(name)


def _is_shard(name: str) -> bool:
    """Whether a file has our header. Raises InputError for a folder of shards without a manifest."""
    filesystem, inner = locate(name)
    if not filesystem.isdir(inner):
        return name.endswith(".parquet") and _has_header(name)
    shards = _parts(name)
    if shards and _has_header(f"{name}/{shards[0]}"):
        raise InputError(
            f"{name}: {len(shards)} shards but no {MANIFEST}: the capture is unfinished; run it again to resume, or "
            "open a single shard"
        )
    return False


def _parts(folder: str) -> list[str]:
    """The names of the files in a folder that could be shards, in order."""
    return [name for name in Folder(folder).names() if name.startswith("data-") and name.endswith(".parquet")]


def _has_header(name: str) -> bool:
    with open_parquet(name, any_size=True) as parquet:
        metadata = parquet.metadata.metadata or {}
    # Any of our keys will do, since one of them may be damaged.
    return any(key.startswith(b"distillkit.") for key in metadata)


def _open_folder(name: str, manifest: Manifest) -> Dataset:
    folder, present = Folder(name), {*_parts(name)}
    listed = [shard.file for shard in manifest.shards]
    for what, names in (("missing", sorted(set(listed) - present)), ("not in it", sorted(present - set(listed)))):
        if names:
            raise MismatchError(f"{name}: {MANIFEST} lists {len(listed)} shards, but {', '.join(names[:5])} is {what}")
    prior = find_prior(manifest.header, None, folder.of(PRIOR))
    files: list[DocumentFile] = []
    for shard in manifest.shards:
        if is_on_hub(name):
            files.append(HubShard(name, manifest, shard, prior))
        else:
            files.append(_listed_shard(folder, manifest, shard, prior))
    return Dataset(name, "distillkit", manifest.header, manifest.header.make_codec(prior), files, manifest.shards)


def _listed_shard(folder: Folder, manifest: Manifest, shard: ShardInfo, prior: Prior | None) -> ShardFile:
    """Opens a shard, and compares it with what the manifest says of it."""
    file = ShardFile(folder.of(shard.file), prior)
    size = folder.size(shard.file)
    if size != shard.bytes or file.documents != shard.documents:
        raise MismatchError(
            f"{file.path}: {size} bytes and {file.documents} documents, but {MANIFEST} says {shard.bytes} and "
            f"{shard.documents}: the files belong to different captures"
        )
    if shard.groups_xxh3 and file.groups_xxh3 != shard.groups_xxh3:
        raise MismatchError(
            f"{file.path}: the hash of its documents is {file.groups_xxh3}, but {MANIFEST} says "
            f"{shard.groups_xxh3}: it is another shard, or of another capture"
        )
    manifest.header.check_same(file.header, where=file.path)
    return file


class HubShard:
    """A shard on the hub. It is opened, and compared with the manifest, when something of it is first read."""

    def __init__(self, folder: str, manifest: Manifest, info: ShardInfo, prior: Prior | None) -> None:
        self.path, self.header, self.documents = f"{folder}/{info.file}", manifest.header, info.documents
        self._folder, self._manifest, self._info, self._prior = folder, manifest, info, prior

    @cached_property
    def _file(self) -> ShardFile:
        return _listed_shard(Folder(self._folder), self._manifest, self._info, self._prior)

    @property
    def groups(self) -> Sequence[int]:
        return self._file.groups

    def load(self, group: int) -> Documents:
        return self._file.load(group)

    def __iter__(self) -> Iterator[Document]:
        return iter(self._file)

    def blocks(self) -> Iterator[Block]:
        return self._file.blocks()

    def info(self) -> ShardInfo:
        return self._info

    def lengths(self) -> npt.NDArray[np.int64]:
        return self._file.lengths()

    def teacher_bytes(self) -> int:
        return self._file.teacher_bytes()

    @property
    def kept_schema(self) -> pa.Schema:
        return self._file.kept_schema


def _documents_in(file: DocumentFile) -> int:
    return file.documents if isinstance(file, (ShardFile, HubShard)) else sum(file.groups)
