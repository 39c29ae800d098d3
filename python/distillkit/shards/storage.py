"""Atomic file writes, local and remote: a file is either complete or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import xxhash
from fsspec.implementations.local import LocalFileSystem

from distillkit.errors import CorruptDataError, DistillKitError

__all__ = ["TEMPORARY_PREFIX", "Folder", "NewFile", "file_hash", "open_source", "reading", "writing"]

TEMPORARY_PREFIX = ".incomplete-"

_WHOLE_AT_ONCE = {"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "hf"}
"""Protocols under which a file only appears once its upload is complete; otherwise it is uploaded under a temporary
name and then moved."""


class Folder:
    """A folder, local or at an fsspec URL, whose files are written atomically.

    Args:
        url: a path, or an fsspec URL such as s3://bucket/captured.

    Attributes:
        url: the path or URL without a trailing slash.
        is_local: whether it is on the local file system.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = str(os.fspath(url)).rstrip("/") or "/"
        self._filesystem, self._root = fsspec.core.url_to_fs(self.url)
        self.is_local = isinstance(self._filesystem, LocalFileSystem)

    def __str__(self) -> str:
        return self.url

    def of(self, name: str) -> str:
        """The path or URL of a file in the folder."""
        return f"{self.url}/{name}"

    def inner(self, name: str) -> Folder:
        """A subfolder."""
        return Folder(self.of(name))

    def make(self) -> None:
        """Creates the folder, if this kind of storage has folders."""
        with writing(self.url):
            self._filesystem.makedirs(self._root, exist_ok=True)

    def names(self) -> list[str]:
        """Names of the files in the folder, sorted; empty if the folder does not exist."""
        self._filesystem.invalidate_cache()
        try:
            entries = self._filesystem.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file")

    def size(self, name: str) -> int | None:
        """Size of a file in bytes, or None if it does not exist."""
        self._filesystem.invalidate_cache()
        try:
            return int(self._filesystem.size(self._inner(name)))
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        """A file's content, or None if it does not exist."""
        try:
            return bytes(self._filesystem.cat_file(self._inner(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Writes a complete file, durably and atomically.

        Raises:
            OSError: the file cannot be written; the message names it and says that finished shards are kept.
        """
        with writing(self.of(name)), self.new_file(name) as file:
            file.stream.write(data)
            file.publish()

    def new_file(self, name: str) -> NewFile:
        """A file that does not appear in the folder until it is published."""
        return _LocalFile(Path(self._root) / name) if self.is_local else _RemoteFile(self, self._filesystem, name)

    def remove(self, name: str) -> None:
        """Removes a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self._inner(name))

    def remove_all(self) -> None:
        """Removes the folder and everything in it, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm(self._root, recursive=True)

    def remove_leftovers(self, name: str | None = None) -> None:
        """Removes the temporary files that killed processes left behind, for one file or for all."""
        for leftover in self.names():
            if leftover.startswith(TEMPORARY_PREFIX + (name or "")):
                self.remove(leftover)

    def free_bytes(self) -> int | None:
        """Free disk space in bytes; None if unknown (remote storage)."""
        if not self.is_local:
            return None
        path = Path(self._root)
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    def _inner(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


class NewFile(ABC):
    """A file being written. Leaving its `with` block without calling `publish` discards it.

    Attributes:
        stream: the stream to write to.
    """

    stream: IO[bytes]

    @abstractmethod
    def publish(self) -> None:
        """Makes the file durable and gives it its final name."""

    @abstractmethod
    def abandon(self) -> None:
        """Discards the file, unless it was published."""

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abandon()


class _LocalFile(NewFile):
    """Written in the same folder under a temporary name that readers ignore, then renamed."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(TEMPORARY_PREFIX + path.name)
        self.stream = open(self._temporary, "wb")  # noqa: SIM115 — closed by publish or abandon

    def publish(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        os.replace(self._temporary, self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def abandon(self) -> None:
        # The buffered data is discarded along with the file, so failing to flush it does not matter.
        with contextlib.suppress(OSError):
            self.stream.close()
        self._temporary.unlink(missing_ok=True)


class _RemoteFile(NewFile):
    """Written to a local temporary file, then uploaded."""

    def __init__(self, folder: Folder, filesystem: Any, name: str) -> None:
        self._folder, self._filesystem, self._name = folder, filesystem, name
        self.stream = tempfile.NamedTemporaryFile(prefix="distillkit-")  # noqa: SIM115 — closed by publish or abandon

    def publish(self) -> None:
        self.stream.flush()
        size = os.fstat(self.stream.fileno()).st_size
        target = f"{self._folder._root.rstrip('/')}/{self._name}"
        protocols = self._filesystem.protocol
        if {protocols} & _WHOLE_AT_ONCE if isinstance(protocols, str) else {*protocols} & _WHOLE_AT_ONCE:
            self._filesystem.put_file(self.stream.name, target)
        else:
            beside = f"{self._folder._root.rstrip('/')}/{TEMPORARY_PREFIX}{self._name}"
            self._filesystem.put_file(self.stream.name, beside)
            self._filesystem.mv(beside, target)
        found = self._folder.size(self._name)
        if found != size:
            raise OSError(errno.EIO, f"{found} of {size} bytes arrived", self._folder.of(self._name))
        self.stream.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.close()


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds to an OSError, such as a full disk, which file was not written and that finished shards are kept."""
    try:
        yield
    except OSError as error:
        if error.filename == str(path):
            raise
        reason = error.strerror or str(error)
        message = f"{reason}; the file was not written, but finished shards are kept: run the command again to resume"
        raise OSError(error.errno, message, str(path)) from error


def file_hash(file: IO[bytes]) -> str:
    """XXH3-128 of a file's content, in hexadecimal."""
    state = xxhash.xxh3_128()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns pyarrow's errors about damaged files into CorruptDataError.

    Operating system errors (a missing file, too many open files, a failing device) have an errno and pass through.
    """
    try:
        yield
    except DistillKitError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorruptDataError(f"{where}: cannot be read: {error}") from error


def open_source(path: str) -> Any:
    """Opens a file (a path or an fsspec URL) for pyarrow, which reads local files natively, without calling Python."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    return pa.OSFile(inner) if isinstance(filesystem, LocalFileSystem) else filesystem.open(inner, "rb")
