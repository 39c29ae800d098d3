"""Opens Parquet files, with an early check for truncated ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.parquet as pq

from distillkit.errors import TruncatedDataError
from distillkit.shards.storage import locate, open_source, reading

__all__ = []


@contextmanager
def open_parquet(path: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file (a path or an fsspec URL) for the `with` block. Every read verifies page checksums.

    Args:
        metadata: the file's footer, if already read.

    Raises:
        FileNotFoundError: the file does not exist.
        TruncatedDataError: it does not end like a Parquet file.
    """
    if metadata is None:
        _check_ends(path)
    with (
        reading(path),
        open_source(path) as file,
        pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True) as parquet,
    ):
        yield parquet


def _check_ends(path: str) -> None:
    filesystem, inner = locate(path)
    if not filesystem.exists(inner):
        raise FileNotFoundError(2, "no such file", path)
    size = filesystem.size(inner)
    if size < 12 or filesystem.cat_file(inner, start=size - 4, end=size) != b"PAR1":
        raise TruncatedDataError(f"{path}: {size} bytes that do not end like a Parquet file: the file is truncated")
