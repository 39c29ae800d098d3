"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import xxhash
from fsspec.implementations.local import LocalFileSystem

from distillkit.errors import CorruptDataError, DistillKitError

__all__ = [
    "TEMPORARY_PREFIX",
    "file_hash",
    "open_source",
    "publish",
    "reading",
    "temporary_path",
    "write_atomically",
    "writing",
]

TEMPORARY_PREFIX = ".incomplete-"


def temporary_path(path: Path) -> Path:
    """Where `path` is written before it is complete: beside it, under a name that no reader looks at."""
    return path.with_name(TEMPORARY_PREFIX + path.name)


def publish(file: IO[bytes], path: Path) -> None:
    """Makes an open temporary file durable and gives it its name; closes it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(temporary_path(path), path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says which file could not be written (a full disk, for example), and that finished shards are kept."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"{reason}; it was not written, finished shards are kept: run again to go on after them"
        raise OSError(error.errno, message, str(path)) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a whole file, durably and at once."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            publish(file, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def file_hash(file: IO[bytes]) -> str:
    """XXH3-128 of a file's content, hexadecimal."""
    state = xxhash.xxh3_128()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns what pyarrow raises over damaged files into CorruptDataError.

    Errors of the operating system (a missing file, no more open files, a device) have a number and stay what they are.
    """
    try:
        yield
    except DistillKitError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorruptDataError(f"{where}: can not be read: {error}") from error


def open_source(path: str) -> Any:
    """A file (a path or an fsspec URL) opened for pyarrow; local ones it reads by itself, without calling Python."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    return pa.OSFile(inner) if isinstance(filesystem, LocalFileSystem) else filesystem.open(inner, "rb")
