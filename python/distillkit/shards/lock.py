"""Who writes to a dataset's folder: two processes never write the same shards.

Each writer has a file in the folder `.capture` that names its process, host and shards. The file is locked as long as
the process lives, so a killed process blocks nobody. Object stores have no locks that end with their holder; nothing is
locked there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import secrets
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from distillkit.errors import CorruptDataError, InputError
from distillkit.shards import os_files
from distillkit.shards.json_text import parse_json
from distillkit.shards.storage import Folder, writing

__all__ = ["CAPTURE_FOLDER", "FolderLock"]

logger = logging.getLogger(__name__)

CAPTURE_FOLDER = ".capture"
_MUTEX, _TURN, _WRITER = "writers.lock", "turn.lock", "writer-"
_ATTEMPTS = 1000
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

_inherited: set[int] = set()


def _close_inherited() -> None:
    """A forked process shares its parent's locks, and would hold them beyond the parent's death."""
    for descriptor in _inherited:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _inherited.clear()


os_files.after_fork(_close_inherited)


class FolderLock:
    """The right to write some shards of a dataset, until it is released or the process ends.

    Args:
        folder: the dataset's folder; created if needed, and then removed again if nothing was written.
        shards: numbers of the shards; None for the whole dataset.

    Raises:
        InputError: another process writes some of them; the message says which one, and since when.
        CorruptDataError: the file of a process that writes there is damaged.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Folder, shards: range | None = None) -> None:
        self._folder, self._shards = folder, shards
        self._release: weakref.finalize[..., FolderLock] | None = None
        if folder.local_path is None:
            return
        self._made = not folder.local_path.exists()
        self._inside = folder.local_path / CAPTURE_FOLDER
        with writing(folder.of(CAPTURE_FOLDER)):
            try:
                with _waiting(self._inside / _MUTEX):
                    self._check_others()
                    self._register()
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning("%s: its file system has no locks (%s): start only one capture there", folder, error)

    def _check_others(self) -> None:
        """Refuse shards that a living process writes; remove the files of dead ones."""
        for path in self._inside.glob(f"{_WRITER}*.json"):
            descriptor = os.open(path, os.O_RDWR)
            try:
                dead = os_files.locked_now(descriptor)
                content = os.read(descriptor, 4096)
            finally:
                os.close(descriptor)
            if dead:
                path.unlink()
                continue
            writer = _writer(parse_json(content, where=str(path)), path)
            theirs = None if writer["shards"] is None else range(*writer["shards"])
            if _overlap(self._shards, theirs):
                raise InputError(
                    f"{self._folder}: process {writer['process']} on {writer['host']} has been writing "
                    f"{_named(theirs)} there since {writer['since']}; wait until it has ended or stop it, or choose "
                    "another folder"
                )

    def _register(self) -> None:
        writer = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "shards": None if self._shards is None else [self._shards.start, self._shards.stop],
        }
        path = self._inside / f"{_WRITER}{secrets.token_hex(8)}.json"
        descriptor = _open_locked(path)
        # Also if it is forgotten, or the program ends.
        self._release = weakref.finalize(self, _unregister, path, descriptor, os.getpid(), self._made)
        os.write(descriptor, json.dumps(writer).encode())

    @property
    def locks(self) -> bool:
        """Whether this kind of storage has locks, so that `turn` and `FolderLock` keep others out."""
        return self._release is not None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits until no other writer of this folder plans or finishes the dataset, and keeps them waiting."""
        if self._release is None:
            yield
        else:
            with _waiting(self._inside / _TURN):
                yield

    def release(self) -> None:
        """Lets others write these shards. Further calls have no effect."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _unregister(path: Path, descriptor: int, process: int, made: bool) -> None:
    if os.getpid() != process:
        return
    with _waiting(path.with_name(_MUTEX)):
        _close(descriptor)
        path.unlink(missing_ok=True)
        unused = [] if list(path.parent.glob(f"{_WRITER}*.json")) else [path.with_name(_TURN), path.with_name(_MUTEX)]
        kept = [lock for lock in unused if not os_files.removed(lock)]
    # Windows keeps a lock's file until nobody has it open.
    for lock in kept:
        os_files.removed(lock)
    # Unless a plan or shards are there, or something that is not ours.
    with contextlib.suppress(OSError):
        path.parent.rmdir()
        if made:
            path.parent.parent.rmdir()


def _writer(content: Any, path: Path) -> dict[str, Any]:
    """What a writer's file says.

    Raises:
        CorruptDataError: it is not what `FolderLock` writes.
    """
    shards = content.get("shards", "missing") if isinstance(content, dict) else "missing"
    known = shards is None or (isinstance(shards, list) and [type(number) for number in shards] == [int, int])
    if not known or not {"process", "host", "since"} <= content.keys():
        raise CorruptDataError(f"{path}: not the file of a process that writes shards: {content!r:.200}")
    return dict(content)


def _overlap(ours: range | None, theirs: range | None) -> bool:
    if ours is None or theirs is None:
        return ours != range(0) and theirs != range(0)
    return max(ours.start, theirs.start) < min(ours.stop, theirs.stop)


def _named(shards: range | None) -> str:
    return "the dataset" if shards is None else f"the shards {shards.start}:{shards.stop}"


def _open_locked(path: Path) -> int:
    """Opens a file, created if needed, and waits until it is locked by this process alone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _inherited.add(descriptor)
    try:
        if not os_files.locked_now(descriptor):
            logger.info("%s: waiting for the process that holds it", path)
            os_files.wait_for_lock(descriptor)
    except BaseException:
        _close(descriptor)
        raise
    return descriptor


def _close(descriptor: int) -> None:
    _inherited.discard(descriptor)
    os.close(descriptor)


@contextmanager
def _waiting(path: Path) -> Iterator[None]:
    """Waits for the lock on a file, which whoever held it may have removed."""
    for attempt in itertools.count():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open_locked(path)
        except (FileNotFoundError, FileExistsError):
            # The folder was removed just now; or something else has its name.
            if attempt == _ATTEMPTS:
                raise
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        _close(descriptor)
    try:
        yield
    finally:
        _close(descriptor)
