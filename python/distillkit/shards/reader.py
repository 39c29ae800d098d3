"""Reading datasets: ours and published ones, by document, with random access."""

from __future__ import annotations

import bisect
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import pyarrow.parquet as pq

from distillkit.codec import Codec, CodecConfig
from distillkit.errors import CorruptDataError, InputError, MismatchError, TruncatedDataError
from distillkit.shards.header import Header
from distillkit.shards.manifest import MANIFEST, Manifest, ShardInfo, read_manifest
from distillkit.shards.table import SCHEMA, Documents, GroupDigest, ShardRows, reading
from distillkit.types import Document

__all__ = ["Dataset", "DocumentFile", "ShardFile", "check_codec"]

_CACHED_GROUPS = {"distillkit": 8, "published": 1}
"""Row groups kept in memory: ours are about 1 MB, published ones can be a thousand times larger."""


class DocumentFile(Protocol):
    """A file of documents, in groups that are read at a time."""

    path: str
    header: Header

    @property
    def groups(self) -> Sequence[int]:
        """How many documents each group has."""

    def load(self, group: int) -> Documents:
        """The documents of one group; each is checked when it is taken."""

    def info(self) -> ShardInfo:
        """What the file holds."""


class ShardFile:
    """One of our shards. No file stays open: each read opens it, with the metadata that was checked here.

    Raises:
        FileNotFoundError: it is not there.
        TruncatedDataError, CorruptDataError, UnsupportedVersionError: it is damaged or of another version.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with reading(path), open_parquet(path) as parquet:
            self._metadata, schema = parquet.metadata, parquet.schema_arrow
            self.header = Header.from_metadata(self._metadata.metadata, where=path)
            self._digests = GroupDigest.from_metadata(self._metadata.metadata, where=path)
            stored = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        self._groups = [digest.documents for digest in self._digests]
        if stored != self._groups or self._metadata.num_rows != sum(stored):
            raise CorruptDataError(
                f"{path}: row groups of {stored} documents, {self._metadata.num_rows} in all, but written were "
                f"{self._groups}"
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
        return sum(self._groups)

    def load(self, group: int) -> ShardRows:
        first = sum(self._groups[:group])
        where = f"{self.path}, documents {first} to {first + self._groups[group] - 1}"
        with reading(where), open_parquet(self.path, self._metadata) as parquet:
            table = parquet.read_row_group(group, columns=self._columns)
            found = GroupDigest.of(table)
        if found != self._digests[group]:
            raise CorruptDataError(f"{where}: they are not the documents that were written, or not in that order")
        return ShardRows(table, self.header, self._codec, self.path, first)

    def info(self) -> ShardInfo:
        """Counts by the lengths of `input_ids`."""
        with reading(self.path), open_parquet(self.path, self._metadata) as parquet:
            column = parquet.read(columns=["input_ids"]).column("input_ids")
            lengths = [int(length) for chunk in column.chunks for length in np.diff(chunk.offsets.to_numpy())]
        rows = sum(self.header.rows_of(length) for length in lengths)
        filesystem, inner = fsspec.core.url_to_fs(self.path)
        name = self.path.rsplit("/", 1)[-1]
        return ShardInfo(name, self.documents, sum(lengths), rows, filesystem.size(inner), "")


@contextmanager
def open_parquet(path: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file (a path or an fsspec URL), open inside the `with`, its page checksums checked on every read.

    Args:
        metadata: its footer, where that was read before.

    Raises:
        FileNotFoundError: it is not there.
        TruncatedDataError: it does not end the way Parquet files end.
    """
    filesystem, inner = fsspec.core.url_to_fs(path)
    if not filesystem.exists(inner):
        raise FileNotFoundError(2, "no such file", path)
    size = filesystem.size(inner)
    if size < 12 or filesystem.cat_file(inner, start=size - 4, end=size) != b"PAR1":
        raise TruncatedDataError(f"{path}: {size} bytes that do not end as a Parquet file does: it was cut off")
    with (
        filesystem.open(inner, "rb") as file,
        pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True) as parquet,
    ):
        yield parquet


class Dataset(Documents):
    """Documents by index, in the order they were captured. Made by `Dataset.open`.

    Safe in forked and spawned workers. Keeps a few row groups in memory, so neighbours are cheap.

    Attributes:
        path: what was opened.
        kind: "distillkit" for our shards, "published" for published datasets.
        header: what is known about the data; of a published dataset only codec, sizes and alignment.
        codec: decodes the documents' teacher bytes.
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
        from distillkit.shards.published import load_codec_config, open_published

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
            return open_published(name, config, split, vocab_size)
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
        for file, group in self._groups:
            yield from file.load(group)

    @property
    def files(self) -> Sequence[DocumentFile]:
        """The files behind `shards`."""
        return self._files


def _is_shard(name: str) -> bool:
    """Whether a file has our header; a folder with such files but without a manifest is refused here."""
    filesystem, inner = fsspec.core.url_to_fs(name)
    if not filesystem.isdir(inner):
        return name.endswith(".parquet") and _has_header(name)
    shards = sorted(filesystem.glob(f"{inner}/data-*.parquet"))
    if shards and _has_header(f"{name}/{Path(shards[0]).name}"):
        raise InputError(
            f"{name}: {len(shards)} shards but no {MANIFEST}: the capture is not finished; run it again to go on, or "
            "open one shard by itself"
        )
    return False


def _has_header(name: str) -> bool:
    with reading(name), open_parquet(name) as parquet:
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
                f"and {shard.documents}: they are of different captures"
            )
        manifest.header.check_same(file.header, where=file.path)
        files.append(file)
    return Dataset(name, "distillkit", manifest.header, files, manifest.shards)


def check_codec(given: Codec, own: Codec, name: str, what: str) -> None:
    """Refuses a codec that is not the dataset's own.

    Raises:
        MismatchError: names the fields and both values.
    """
    if given.format != own.format:
        raise MismatchError(
            f"{name}: {what} is {own.format}, the configuration given is {given.format}; leave it out, the dataset has "
            "its own"
        )
    ours, theirs = given.to_dict()["config"], own.to_dict()["config"]
    odd = [f"{key} {theirs[key]!r} (given: {ours[key]!r})" for key in theirs if ours[key] != theirs[key]]
    if odd:
        raise MismatchError(
            f"{name}: {what} has {', '.join(odd)}; leave the configuration out, the dataset has its own"
        )
