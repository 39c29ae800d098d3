"""Opens a Parquet file of a shard, and refuses one that is cut off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pyarrow.parquet as pq

from distillkit.errors import TruncatedDataError
from distillkit.shards.storage import open_source, reading

__all__ = []


@contextmanager
def open_parquet(path: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file (a path or an fsspec URL), open inside the `with`, its page checksums checked on every read.

    Args:
        metadata: its footer, where that was read before.

    Raises:
        FileNotFoundError: it is not there.
        TruncatedDataError: it does not end the way Parquet files end.
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
    filesystem, inner = fsspec.core.url_to_fs(path)
    if not filesystem.exists(inner):
        raise FileNotFoundError(2, "no such file", path)
    size = filesystem.size(inner)
    if size < 12 or filesystem.cat_file(inner, start=size - 4, end=size) != b"PAR1":
        raise TruncatedDataError(f"{path}: {size} bytes that do not end like a Parquet file: the file is truncated")
