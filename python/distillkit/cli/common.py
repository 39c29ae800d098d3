"""What all commands share: exit statuses, error messages, logging and common options."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from distillkit.cli.entry import was_interrupted
from distillkit.configuration.secrets import redacted
from distillkit.errors import DistillKitError, nearest, printable

if TYPE_CHECKING:
    from rich.table import Table

    from distillkit.types import Shown

    _Choice = click.Choice[str]
else:
    _Choice = click.Choice  # Not generic before click 8.4.

__all__ = [
    "CONFIG",
    "HTML",
    "JSON",
    "LARGEST",
    "SET",
    "SPLIT",
    "Choice",
    "LogHandler",
    "check_writable",
    "facts_table",
    "run_cli",
    "stopping_on_sigterm",
]


class Choice(_Choice):
    """One of several names; a mistyped one is answered with the closest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            names = ", ".join(map(repr, self.choices))
            self.fail(f"must be one of {names}, found {value!r}{nearest(value, self.choices)}", param, ctx)


def facts_table(report: Shown) -> Table:
    """Formats a report as the table of its facts."""
    from rich.table import Table
    from rich.text import Text

    title, facts = report.facts()
    table = Table(title=Text(title), show_header=False, title_justify="left")
    for label, value in facts:
        table.add_row(label, Text(value))
    return table


# Options of the commands that read published datasets.
CONFIG = click.option(
    "--config",
    type=click.Path(dir_okay=False),
    help="YAML file with the codec of a published dataset that has no compression_config.yaml next to it.",
)
SPLIT = click.option("--split", help="Split of a published dataset that has splits.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
# Of the commands that read a configuration file.
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a value in place of the file's, such as training_args.max_steps=100: a dotted path, entries of lists by "
    "their index, and the value in YAML. May be repeated.",
)

HTML = click.option(
    "--html", "page", type=click.Path(path_type=Path), help="Write a page to look at to this file (HTML)."
)


def check_writable(path: Path, ending: str, option: str) -> None:
    """Refuse a file with plots that cannot be written, before the long computation rather than after it.

    Args:
        path: the file.
        ending: what its name must end in.
        option: the option that names it.
    """
    if path.suffix.lower() != ending:
        kind = ending[1:].upper()
        raise click.BadParameter(f"{path}: this is written as {kind}; the name must end in {ending}", param_hint=option)
    if path.is_dir():
        raise click.BadParameter(f"{path}: is a folder; give the name of a file", param_hint=option)
    folder = path.absolute().parent
    if not os.access(folder, os.W_OK):
        raise click.BadParameter(f"{folder}: not a writable folder", param_hint=option)
    import matplotlib  # noqa: F401


LARGEST = 2**31 - 1
"""The largest count that an option takes; numpy and Parquet count no further in some places."""

_EXTRAS = {
    "torch": "capture",
    "transformers": "capture",
    "accelerate": "capture",
    "datasets": "capture",
    "trl": "train",
    "peft": "train",
    "psutil": "capture",
    "matplotlib": "plot",
    "huggingface_hub": "hub",
    "ray": "ray",
    "s3fs": "s3",
}
"""Optional packages, each with the extra that installs it."""


def run_cli(command: click.Command) -> NoReturn:
    """Run a command and exit: 0 success, 1 failure (a message on stderr), 2 wrong usage, 130 interrupted, 143 SIGTERM.

    Errors of distillkit and of the file system are printed as messages; anything else is a bug, with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # Some terminal encodings lack ‖ and ×: print ? instead of failing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogHandler()])
    logging.getLogger("distillkit").setLevel(logging.INFO)
    try:
        status = command.main(standalone_mode=False) or 0
        sys.stdout.flush()
        sys.exit(status)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        message = io.StringIO()
        error.show(message)
        click.echo(printable(message.getvalue()), err=True, nl=False)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _leave_interrupted()
    except Terminated:
        click.echo("stopped by SIGTERM: complete files are kept, run the same command again to resume", err=True)
        sys.exit(128 + signal.SIGTERM)
    except BrokenPipeError:
        # The reader of the output has exited, as with `| head`. Python's flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        _fail(f"this needs {package}, which is not installed: pip install 'distillkit[{_EXTRAS[package]}]'")
    except (DistillKitError, OSError) as error:
        _fail(_text(error))
    except Exception as error:  # noqa: BLE001 - printed whole, but for secrets and control characters
        if was_interrupted():
            _leave_interrupted()
        click.echo(printable(redacted("".join(traceback.format_exception(error)))), err=True, nl=False)
        sys.exit(1)


class Terminated(BaseException):
    """The process received SIGTERM."""


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM, as sent by batch systems, into an exception, so that files being written are discarded."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        # Ignore further signals, so that cleaning up is not interrupted.
        signal.signal(number, signal.SIG_IGN)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave_interrupted() -> NoReturn:
    click.echo("interrupted: complete files are kept", err=True)
    sys.exit(128 + signal.SIGINT)


def _fail(message: str) -> NoReturn:
    if was_interrupted():
        _leave_interrupted()
    from rich.text import Text

    from distillkit.console import progress_console

    text = Text.assemble(("error:", "bold red"), " ", redacted(message))
    progress_console().print(text, highlight=False, soft_wrap=True)
    sys.exit(1)


def _text(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


class LogHandler(logging.Handler):
    """Prints log messages to stderr. Most commands have none, so what prints them is only imported for the first."""

    _printer: logging.Handler | None = None

    def emit(self, record: logging.LogRecord) -> None:
        from rich.logging import RichHandler

        from distillkit.console import progress_console

        if self._printer is None:
            self._printer = RichHandler(
                console=progress_console(), show_time=False, show_path=False, rich_tracebacks=False, markup=False
            )
            self._printer.setFormatter(self.formatter)
        record.msg, record.args = redacted(record.getMessage()), None
        self._printer.emit(record)
