"""What operating systems do differently with files: locks, durable names, and removing files that are open.

Unix locks whole files (flock), forks processes that share their parent's locks, and removes files that are open. A new
name is durable there once its folder is synced. Windows locks ranges of bytes, does not fork, keeps open files, and
records names durably by itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:
    import msvcrt

    # As Any, since type checkers see this module as the system they run on has it.
    _windows: Any = msvcrt
else:
    _windows = None

__all__ = ["after_fork", "locked_now", "removed", "sync", "sync_folder", "wait_for_lock"]

# Windows keeps others from reading the bytes that are locked, so this one is far behind the end of every lock's file.
_LOCKED_BYTE = 1 << 30
_SECONDS_BETWEEN = 0.05


def locked_now(descriptor: int) -> bool:
    """Whether a file, open for writing, could be locked for this process alone without waiting.

    The lock ends when the descriptor is closed or the process ends, in whatever way.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        if _windows is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            _lock_byte(descriptor)
    except BlockingIOError:
        return False
    except PermissionError:
        if _windows is None:
            raise
        return False
    return True


def wait_for_lock(descriptor: int) -> None:
    """Locks a file as `locked_now` does, after whoever holds the lock has released it."""
    if _windows is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    while not locked_now(descriptor):
        time.sleep(_SECONDS_BETWEEN)


def _lock_byte(descriptor: int) -> None:
    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    try:
        _windows.locking(descriptor, _windows.LK_NBLCK, 1)
    finally:
        os.lseek(descriptor, at, os.SEEK_SET)


def after_fork(action: Callable[[], None]) -> None:
    """Runs an action in every process that this one forks, where processes can fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=action)


def removed(path: Path) -> bool:
    """Removes a file that may be open; False if it is, and the system therefore keeps it (Windows)."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        if _windows is None:
            raise
        return False
    return True


def sync(path: Path) -> None:
    """Writes a file's content through to the disk."""
    # Windows syncs only what is open for writing.
    _sync(path, os.O_RDONLY if _windows is None else os.O_RDWR)


def sync_folder(path: Path) -> None:
    """Writes a folder's names through to the disk. Windows does so by itself, and opens no folders."""
    if _windows is None:
        _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
