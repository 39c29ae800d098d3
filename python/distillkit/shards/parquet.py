"""Opens Parquet files and checks Arrow data that others wrote, before any value is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from distillkit.configuration.urls import locate
from distillkit.errors import CorruptDataError, TruncatedDataError
from distillkit.shards.footer import Chunk, read_footer
from distillkit.shards.storage import missing_file, open_source, read_range, reading

__all__ = []

_ALLOWED_BYTES, _ALLOWED_RATIO = 1 << 28, 200
"""A row group may always decode to so many bytes, and to more only in proportion to its bytes in the file:
distributions and text do not compress to a two-hundredth."""

_Tabular = TypeVar("_Tabular", pa.Table, pa.RecordBatch)


@contextmanager
def open_parquet(
    path: str, metadata: pq.FileMetaData | None = None, *, any_size: bool = False
) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file (a path or an fsspec URL) for the `with` block. Every read verifies page checksums.

    Args:
        metadata: the file's footer, if already read.
        any_size: also open files of which a few bytes decode to gigabytes, which takes a look at each row group to
            tell. For footers alone, and shards.

    Raises:
        FileNotFoundError: the file does not exist.
        TruncatedDataError: it does not end like a Parquet file.
        CorruptDataError: it does not begin like one, is damaged, or a few of its bytes decode to gigabytes.
    """
    if metadata is None:
        _check_ends(path)
        if not any_size:
            _check_size(path)
    with (
        reading(path),
        open_source(path) as file,
        pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True) as parquet,
    ):
        yield parquet


def _check_size(path: str) -> None:
    """Refuse a row group of which a few bytes decode to gigabytes, judged by the footer."""
    for number, columns in enumerate(footer_of(path)):
        stored = sum(column.total_compressed_size for column in columns)
        decoded = sum(column.decoded for column in columns)
        if decoded > max(_ALLOWED_BYTES, _ALLOWED_RATIO * stored):
            raise CorruptDataError(
                f"{path}: row group {number} takes {stored:,} bytes in the file, but {decoded:,} in memory: not read. "
                "If its content is right, write it in smaller row groups"
            )


def footer_of(path: str) -> list[list[Chunk]]:
    """The columns of each row group of a Parquet file (a path or an fsspec URL), from its footer.

    Raises:
        CorruptDataError: the footer is damaged.
    """
    filesystem, inner = locate(path)
    with reading(path):
        size = filesystem.size(inner)
        length = int.from_bytes(read_range(path, size - 8, size - 4), "little")
        if length > size - 12:
            raise ValueError(f"a footer of {length:,} bytes in {size:,}")
        return read_footer(read_range(path, size - 8 - length, size - 8))


def check_names(schema: pa.Schema, names: Iterable[str], where: object) -> None:
    """Refuse a file with several columns of one of these names.

    Raises:
        CorruptDataError: it has.
    """
    for name in names:
        if (count := schema.names.count(name)) > 1:
            raise CorruptDataError(f"{where}: has {count} columns with the name {name}")


def validated(data: _Tabular, where: object) -> _Tabular:
    """Return a table or batch after checking its offsets, sizes and text, which readers of its values rely on: damaged
    ones lead outside the memory of the data.

    Raises:
        CorruptDataError: the data are damaged.
    """
    try:
        data.validate(full=True)
    except pa.ArrowException as error:
        raise CorruptDataError(f"{where}: damaged Arrow data: {error}") from error
    return data


def _check_ends(path: str) -> None:
    filesystem, inner = locate(path)
    if not filesystem.exists(inner):
        raise missing_file(filesystem, inner, path)
    size = filesystem.size(inner)
    with reading(path):
        start, end = read_range(path, 0, min(size, 4)), read_range(path, max(size - 4, 0), size)
    if not b"PAR1".startswith(start):
        raise CorruptDataError(f"{path}: not a Parquet file: its first bytes are {start!r}, expected b'PAR1'")
    if size < 12 or end != b"PAR1":
        raise TruncatedDataError(f"{path}: {size} bytes that do not end like a Parquet file: the file is truncated")
