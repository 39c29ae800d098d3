"""What all commands share: exit statuses, where output goes, and how numbers are written."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

import click
from rich.console import Console
from rich.logging import RichHandler

from distillkit.errors import DistillKitError

__all__ = ["output", "progress_console", "run_cli"]


def output() -> Console:
    """The console for what a command was asked for: stdout. Plain text where it is no terminal or `NO_COLOR` is set."""
    return Console(highlight=False)


def progress_console() -> Console:
    """The console for logs and progress: stderr."""
    return Console(stderr=True)


def run_cli(command: click.Command) -> NoReturn:
    """Runs a command and exits: 0 done, 1 it failed (one message on stderr), 2 wrong usage, 130 interrupted.

    Errors that distillkit raises on purpose and those of the file system are messages; anything else is a bug and
    keeps its traceback.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_log_handler()])
    logging.getLogger("distillkit").setLevel(logging.INFO)
    try:
        sys.exit(command.main(standalone_mode=False) or 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        progress_console().print("interrupted")
        sys.exit(130)
    except (DistillKitError, OSError) as error:
        progress_console().print(f"[bold red]error:[/] {_text(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _text(error: Exception) -> str:
    from rich.markup import escape

    return escape(
        f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    )


def _log_handler() -> logging.Handler:
    return RichHandler(
        console=progress_console(), show_time=False, show_path=False, rich_tracebacks=False, markup=False
    )
