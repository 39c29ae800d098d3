"""Atomic file writes, local and remote: a file is either complete or absent."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import re
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import xxhash
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from distillkit.configuration.hub import hub_problem, is_hub_error
from distillkit.configuration.urls import is_on_hub, locate, without_trailing_slash
from distillkit.errors import CorruptDataError, DistillKitError
from distillkit.shards import os_files

__all__ = [
    "TEMPORARY_PREFIX",
    "Folder",
    "NewFile",
    "file_hash",
    "map_source",
    "missing_file",
    "open_source",
    "read_range",
    "reading",
    "writing",
]

TEMPORARY_PREFIX = ".incomplete-"
_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + r"(?P<name>.+?)(\.[0-9a-f]{8})?")
"""Names of files that are being written. The digits tell apart those that several processes write under one name."""

_LARGEST_JSON = 1 << 28
"""Bytes of a manifest, plan or receipt: about a million shards."""

_HUB_BLOCK = 1 << 16
"""Bytes that are read ahead of a shard on the hub: as much as the small columns of a row group take."""

_ANSWER_SECONDS, _SLOWEST_UPLOAD = 300.0, 100_000.0
"""How long storage elsewhere may take to answer, and how many bytes it must take in a second."""

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
        self.url = without_trailing_slash(url)
        self._filesystem, self._root = locate(self.url)
        self.is_local = isinstance(self._filesystem, LocalFileSystem)

    def __str__(self) -> str:
        return self.url

    @property
    def local_path(self) -> Path | None:
        """Where it is on the local file system; None if it is elsewhere."""
        return Path(self._root) if self.is_local else None

    def of(self, name: str) -> str:
        """The path or URL of a file in the folder."""
        return f"{self.url}{name}" if self.url.endswith("/") else f"{self.url}/{name}"

    def inner(self, name: str) -> Folder:
        """A subfolder."""
        return Folder(self.of(name))

    def make(self) -> None:
        """Creates the folder, if this kind of storage has folders."""
        with writing(self.url):
            self._ask("makedirs", self._root, exist_ok=True)

    def names(self) -> list[str]:
        """Names of the files in the folder, sorted; empty if the folder does not exist."""
        self._filesystem.invalidate_cache()
        try:
            if self.is_local:
                with os.scandir(self._root) as entries:
                    return sorted(entry.name for entry in entries if entry.is_file())
            found = self._ask("ls", self._root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file")

    def size(self, name: str) -> int | None:
        """Size of a file in bytes, or None if it does not exist."""
        self._filesystem.invalidate_cache()
        try:
            return int(self._ask("size", self._inner(name)))
        except FileNotFoundError:
            return None

    def read(self, name: str, most: int | None = _LARGEST_JSON) -> bytes | None:
        """The content of a file, or None if it does not exist.

        Raises:
            CorruptDataError: it is a device, a pipe or a folder, or has more than `most` bytes.
        """
        self._filesystem.invalidate_cache()
        try:
            found = self._ask("info", self._inner(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if found["type"] != "file":
            raise CorruptDataError(f"{self.of(name)} is not a regular file ({found['type']})")
        if most is not None and (found["size"] or 0) > most:
            raise CorruptDataError(f"{self.of(name)} has {found['size']} bytes, expected at most {most}")
        return bytes(self._ask("cat_file", self._inner(name)))

    def file_hash(self, name: str) -> str:
        """The hash of a file's content; see `file_hash`."""
        with self._filesystem.open(self._inner(name), "rb") as file:
            return file_hash(file)

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
        return _LocalFile(Path(self._root) / name) if self.is_local else _RemoteFile(self, name)

    def remove(self, name: str) -> None:
        """Removes a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm_file", self._inner(name))

    def remove_files(self, ours: Callable[[str], bool]) -> None:
        """Removes the files of these names with their leftovers, and the folder if it is then empty."""
        for name in self.names():
            if ours(name):
                self.remove(name)
        self.remove_leftovers(ours)
        if self.is_local:
            # Whatever else is in it belongs to someone else.
            with contextlib.suppress(OSError):
                os.rmdir(self._root)

    def remove_leftovers(self, ours: Callable[[str], bool]) -> None:
        """Removes the temporary files that killed processes left behind of the files of these names."""
        for leftover in self.names():
            temporary = _TEMPORARY.fullmatch(leftover)
            if temporary and ours(temporary["name"]):
                self.remove(leftover)

    def free_bytes(self) -> int | None:
        """Free disk space in bytes; None if unknown (remote storage)."""
        if not self.is_local:
            return None
        path = Path(self._root)
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    def upload(self, path: str, name: str, size: int) -> None:
        """Uploads a local file of `size` bytes, which does not appear in the folder before it is whole."""
        target, seconds = self._inner(name), _ANSWER_SECONDS + size / _SLOWEST_UPLOAD
        protocols = self._filesystem.protocol
        if {protocols} & _WHOLE_AT_ONCE if isinstance(protocols, str) else {*protocols} & _WHOLE_AT_ONCE:
            self._ask("put_file", path, target, seconds=seconds)
            return
        beside = self._inner(_temporary_name(name))
        self._ask("put_file", path, beside, seconds=seconds)
        if type(self._filesystem).mv is AbstractFileSystem.mv:
            # It would expand *, ? and [ in the names.
            self._ask("cp_file", beside, target, seconds=seconds)
            self._ask("rm_file", beside)
        else:
            self._filesystem.mv(beside, target)

    def _ask(self, method: str, *arguments: Any, seconds: float | None = None, **options: Any) -> Any:
        """Calls the file system. Where a connection could hang for good, the answer must come within some time.

        Raises:
            OSError: whatever the file system raises.
        """
        call = getattr(self._filesystem, method)
        limit = seconds or _ANSWER_SECONDS
        if inspect.iscoroutinefunction(getattr(call, "__wrapped__", None)):
            options["timeout"] = limit
        try:
            return call(*arguments, **options)
        except FSTimeoutError as error:
            raise TimeoutError(errno.ETIMEDOUT, f"no answer to {method} within {limit:.0f} s", self.url) from error
        except (DistillKitError, FileNotFoundError):
            raise
        except Exception as error:
            if is_hub_error(error):
                raise DistillKitError(f"{self.url}: the hub: {hub_problem(error)}") from error
            if isinstance(error, OSError):
                raise
            # Clients of storage have errors of their own, as for missing credentials.
            raise OSError(errno.EIO, f"{method} failed: {error}", self.url) from error

    def _inner(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _temporary_name(name: str) -> str:
    return f"{TEMPORARY_PREFIX}{name}.{secrets.token_hex(4)}"


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
        self._path, self._temporary = path, path.with_name(_temporary_name(path.name))
        self.stream = open(self._temporary, "wb")  # noqa: SIM115 — closed by publish or abandon

    def publish(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        os.replace(self._temporary, self._path)
        os_files.sync_folder(self._path.parent)

    def abandon(self) -> None:
        # The buffered data is discarded along with the file, so failing to flush it does not matter.
        with contextlib.suppress(OSError):
            self.stream.close()
        self._temporary.unlink(missing_ok=True)


class _RemoteFile(NewFile):
    """Written to a local temporary file, then uploaded."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        # While it is open, Windows does not open it again for the upload.
        self.stream = tempfile.NamedTemporaryFile(prefix="distillkit-", delete=False)  # noqa: SIM115

    def publish(self) -> None:
        self.stream.close()
        size = os.path.getsize(self.stream.name)
        self._folder.upload(self.stream.name, self._name, size)
        found = self._folder.size(self._name)
        if found != size:
            raise OSError(errno.EIO, f"{found} of {size} bytes arrived", self._folder.of(self._name))
        self.abandon()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.close()
        Path(self.stream.name).unlink(missing_ok=True)


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
        if is_hub_error(error):
            raise DistillKitError(f"{where}: the hub: {hub_problem(error)}") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorruptDataError(f"{where}: cannot be read: {error}") from error


def open_source(path: str) -> Any:
    """Opens a file (a path or an fsspec URL) for pyarrow, which reads local files natively, without calling Python."""
    filesystem, inner = locate(path)
    if isinstance(filesystem, LocalFileSystem):
        return pa.OSFile(os.fsencode(inner))  # bytes, since a name need not be UTF-8
    # The hub's own block would read five megabytes for each row group of one.
    options = {"block_size": _HUB_BLOCK} if is_on_hub(path) else {}
    return filesystem.open(inner, "rb", **options)


def read_range(path: str, start: int, end: int) -> bytes:
    """Reads the bytes `start` … `end` − 1 of a file (a path or an fsspec URL), and no others."""
    filesystem, inner = locate(path)
    options = {"cache_type": "none"} if is_on_hub(path) else {}
    return bytes(filesystem.cat_file(inner, start=start, end=end, **options))


def missing_file(filesystem: AbstractFileSystem, inner: str, name: str) -> Exception:
    """The error for a file or folder that a file system says does not exist, which the hub also says of others."""
    if is_on_hub(name):
        try:
            filesystem.info(inner)
        except Exception as error:  # noqa: BLE001 — explained
            if is_hub_error(error):
                return DistillKitError(f"{name}: the hub: {hub_problem(error)}")
    return FileNotFoundError(2, "no such file or folder", name)


def map_source(path: str) -> Any:
    """Opens a file as `open_source` does; local ones are mapped into memory."""
    filesystem, inner = locate(path)
    is_local = isinstance(filesystem, LocalFileSystem)
    return pa.memory_map(os.fsencode(inner)) if is_local else filesystem.open(inner, "rb")
