"""Windows as far as the package can tell: without Unix's modules and functions, and with files that stay while open.

`as_on_windows` changes what the package's own modules import; libraries go on as on the system they run on. Windows
itself is where the release workflow runs `tests/smoke.py`.
"""

from __future__ import annotations

import builtins
import errno
import os
import stat
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What Python has on Unix only.
MODULES = {"fcntl", "grp", "posix", "pwd", "resource", "syslog", "termios"}
FUNCTIONS = {
    *("O_CLOEXEC", "O_DIRECTORY", "O_NONBLOCK", "ST_RDONLY", "SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2"),
    *("chown", "fork", "getpgid", "getuid", "geteuid", "killpg", "lockf", "mkfifo", "nice", "pread", "pwrite"),
    *("register_at_fork", "sched_getaffinity", "sched_setaffinity", "setsid", "statvfs", "sysconf", "uname", "wait4"),
}
"""Names of `os` and `signal`."""


def as_on_windows(folder: Path) -> None:
    """Make the rest of this process as on Windows, for modules of the package, and for files below `folder`."""
    replaced = {"os": _os(), "msvcrt": _msvcrt(), "psutil": _psutil()}
    ordinary = builtins.__import__

    def imported(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if level == 0 and globals and str(globals.get("__name__")).partition(".")[0] == "distillkit":
            if name.partition(".")[0] in MODULES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in replaced:
                return replaced[name]
        return ordinary(name, globals, locals, fromlist, level)

    builtins.__import__ = imported
    for name in ("unlink", "remove", "rename", "replace"):
        setattr(os, name, _unless_open(getattr(os, name), folder))
    os.open = _without_folders(os.open, folder)


def _os() -> types.ModuleType:
    module = types.ModuleType("os")
    # Calls go to the real module, where some are replaced later.
    module.__getattr__ = _of_windows  # type: ignore[method-assign]
    return module


def _of_windows(name: str) -> Any:
    if name in FUNCTIONS:
        raise AttributeError(f"module 'os' has no attribute {name!r}")
    return getattr(os, name)


def _msvcrt() -> types.ModuleType:
    """`locking` by Unix's locks of ranges: not for two descriptors of one process."""
    module = types.ModuleType("msvcrt")

    def locking(descriptor: int, mode: int, count: int) -> None:
        try:
            os.lockf(descriptor, os.F_TLOCK, count)
        except OSError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error

    module.__dict__.update(LK_NBLCK=2, locking=locking)
    return module


def _psutil() -> Any:
    import psutil

    class Process(psutil.Process):
        def memory_info(self) -> Any:
            info = super().memory_info()
            return types.SimpleNamespace(**info._asdict(), peak_wset=info.rss)

    module = types.ModuleType("psutil")
    module.__dict__.update({**vars(psutil), "Process": Process})
    return module


def _unless_open(action: Callable[..., None], folder: Path) -> Callable[..., None]:
    """An action on files, which fails while this process has one of them open."""

    def act(*paths: Any, **options: Any) -> None:
        # Files of `tempfile` (tmp…) are removed by Windows itself.
        ours = [path for path in map(str, paths) if path.startswith(f"{folder}{os.sep}")]
        names = {os.path.realpath(path) for path in ours if not os.path.basename(path).startswith("tmp")}
        held = names & {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()} if names else set()
        if held:
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(held.pop()))
        action(*paths, **options)

    return act


def _without_folders(action: Callable[..., int], folder: Path) -> Callable[..., int]:
    """`os.open`, which opens no folders on Windows."""

    def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if str(path).startswith(str(folder)) and os.path.exists(path) and stat.S_ISDIR(os.stat(path).st_mode):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return action(path, flags, *arguments, **options)

    return opened
