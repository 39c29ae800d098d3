"""All terminal output goes through here: consoles, progress bars, and the formatting of byte counts and durations.

Names of teachers, columns and files come from others, and so may contain anything. Consoles therefore write control
characters as escapes, and take neither markup nor emoji codes: what has a style is a `Text`.
"""

from __future__ import annotations

import html
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from distillkit.errors import printable

__all__ = [
    "duration",
    "figure",
    "human_bytes",
    "in_notebook",
    "make_progress",
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
def progress_bar(what: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar, on stderr if that is a terminal or in a notebook, while the block runs. Yields an
    update(done, total)."""
    console = progress_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with make_progress(*columns, console=console, shown=shown and console.is_terminal, notebook=shown) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def make_progress(
    *columns: ProgressColumn, console: Console, shown: bool, notebook: bool, transient: bool = True
) -> Progress:
    """A progress display: in a notebook one that needs no widgets, elsewhere rich's.

    Args:
        columns: rich's columns.
        console: where rich shows them.
        shown: whether rich shows anything.
        notebook: whether a notebook shows anything.
        transient: whether the display disappears at its end.
    """
    if in_notebook():
        return _NotebookProgress(console=console, disable=not notebook, transient=transient)
    return Progress(*columns, console=console, disable=not shown, transient=transient)


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


class _NotebookProgress(Progress):
    """A progress display as HTML that replaces itself. rich's own would need ipywidgets in a notebook."""

    _SECONDS = 0.2

    def __init__(self, *, console: Console, disable: bool, transient: bool) -> None:
        super().__init__(console=console, auto_refresh=False, disable=disable)
        self._passing, self._last = transient, 0.0
        self._handle: Any = None

    def start(self) -> None:
        """Show it, below what the cell has printed."""
        if not self.disable:
            self._handle = sys.modules["IPython"].display.display(self._content(), display_id=True)

    def stop(self) -> None:
        """Show the last state, or remove it."""
        if self._handle is not None:
            self._handle.update(sys.modules["IPython"].display.HTML("") if self._passing else self._content())
            self._handle = None

    def refresh(self) -> None:
        """Replace what is shown, a few times a second."""
        if self._handle is not None and time.monotonic() - self._last >= self._SECONDS:
            self._handle.update(self._content())

    def update(self, *arguments: Any, **named: Any) -> None:
        """As rich's."""
        super().update(*arguments, **named)
        self.refresh()

    def _content(self) -> Any:
        self._last = time.monotonic()
        return sys.modules["IPython"].display.HTML("".join(map(_task_html, self.tasks)))


def _task_html(task: Task) -> str:
    """A line for a task: its name, a bar, its counts, and what is said of it."""
    total = "" if task.total is None else f" max='{task.total:g}'"
    value = "" if task.total is None else f" value='{task.completed:g}'"
    counts = "" if task.total is None else f"{task.completed:,.0f}/{task.total:,.0f}"
    notes = [str(note) for note in task.fields.values() if note]
    text = "  ".join([counts, *notes, f"{duration(task.elapsed or 0)}"])
    return (
        f"<div>{html.escape(printable(task.description))} <progress{value}{total}></progress> "
        f"{html.escape(printable(text))}</div>"
    )


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


_LARGE = 1e7


def figure(value: float, form: str) -> str:
    """Formats a figure with a format string, and as 6.46e25 if it is too large to be read otherwise, as the perplexity
    of a student that knows nothing yet."""
    return f"{value:.2e}".replace("e+0", "e").replace("e+", "e") if abs(value) >= _LARGE else form.format(value)
