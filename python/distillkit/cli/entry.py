"""The programs' entry points. Only what Python itself needs is imported here, so that Ctrl-C is answered at once."""

from __future__ import annotations

import atexit
import importlib
import os
import signal
from types import FrameType

__all__ = ["codec", "main", "was_interrupted"]

_INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Run `distillkit`."""
    _run("distillkit.cli.main")


def codec() -> None:
    """Run `distillkit-codec`."""
    _run("distillkit.cli.codec")


def _run(module: str) -> None:
    """Import a command line and run it.

    Ctrl-C ends imports at once: there is nothing to clean up, and libraries turn the exception into others. Later, the
    first one is a KeyboardInterrupt, so that files being written are discarded, and the next one ends the process.
    """
    # If SIGINT is ignored, as in background jobs of a shell, it stays so.
    handled = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if handled:
        signal.signal(signal.SIGINT, _end)
        # As the last of what is done at exit: from then on Python itself would end the process by the signal.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    command = importlib.import_module(module)
    if handled:
        signal.signal(signal.SIGINT, _interrupt)
    command.main()


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed: libraries that are being imported turn the KeyboardInterrupt into other errors."""
    return signal.getsignal(signal.SIGINT) is _end


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _end)
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    # A progress bar hides the cursor, and nothing after this would show it.
    os.write(2, b"\x1b[?25hinterrupted\n" if os.isatty(2) else b"interrupted\n")
    os._exit(_INTERRUPTED)
