"""All terminal output goes through here: consoles, progress bars, and the formatting of byte counts and durations.

Names of teachers, columns and files come from others, and so may contain anything. Consoles therefore write control
characters as escapes, and take neither markup nor emoji codes: what has a style is a `Text`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from distillkit.errors import printable

__all__ = [
    "duration",
    "figure",
    "human_bytes",
    "number_of",
    "output",
    "progress_bar",
    "progress_console",
    "quiet_libraries",
    "say",
    "show",
]


class _Console(Console):
    """A console on which only rich's own control codes reach the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        if isinstance(renderable, Text) and (plain := printable(renderable.plain)) != renderable.plain:
            # Before it is divided into lines, as escapes are longer.
            renderable = Text(plain, renderable.style, justify=renderable.justify, overflow=renderable.overflow)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def output() -> Console:
    """The console for a command's results: stdout, as plain text if it is not a terminal or `NO_COLOR` is set."""
    return _Console(highlight=False, markup=False, emoji=False)


def progress_console() -> Console:
    """The console for logs and progress: stderr."""
    return _Console(stderr=True, markup=False, emoji=False)


def say(text: str) -> None:
    """Prints a line of plain text to stdout, however long."""
    click.echo(printable(text))


def show(renderable: RenderableType) -> None:
    """Prints to stdout without rich's trailing spaces, which would only get in the way in a pipe."""
    console = output()
    with console.capture() as captured:
        console.print(renderable)
    for line in captured.get().split("\n")[:-1]:
        click.echo(line.rstrip(), color=console.is_terminal)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on stderr, if that is a terminal, while the block runs. Yields an update(done, total)."""
    console = progress_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def quiet_libraries() -> None:
    """Import transformers, and let its messages and the hub's come once, and like ours.

    The libraries print their messages themselves when they are imported, and pass them on as well. Their progress bars
    would collide with ours.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.enable_propagation()
    for library in ("transformers", "huggingface_hub", "datasets"):
        logging.getLogger(library).handlers.clear()
    # Says at each start that a faster kernel for 4-bit weights on CPUs could be installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("transformers.integrations.hub_kernels").addFilter(_worth_saying)


def _worth_saying(record: logging.LogRecord) -> bool:
    """Whether a message is not the advice to install kernels for GPUs on a machine that has none."""
    if "reference PyTorch implementation" not in record.getMessage():
        return True
    import torch

    return torch.cuda.is_available()


def human_bytes(count: float) -> str:
    """A byte count in readable form: 999 bytes, 8.4 MB, 1.25 TB (powers of 1000, three significant digits)."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    if units[0] == "bytes":
        return f"{value:.0f} byte" if round(value) == 1 else f"{value:.0f} bytes"
    return f"{value:.{max(0, 2 - (value >= 9.995) - (value >= 99.95))}f} {units[0]}"


def duration(seconds: float) -> str:
    """Formats seconds as 0:07, 12:05 or 3:04:05."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number_of(count: int, noun: str) -> str:
    """Formats a count with its noun: 1 document, 2,048 documents."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


_LARGE = 1e6


def figure(value: float, form: str) -> str:
    """Formats a figure with a format string, and as 6.46e25 if it is too large to be read otherwise, as the perplexity
    of a student that knows nothing yet."""
    return f"{value:.2e}".replace("e+", "e") if abs(value) >= _LARGE else form.format(value)
