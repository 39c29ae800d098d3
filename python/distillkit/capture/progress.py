"""The progress bar of a capture, on stderr or in a notebook."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distillkit.console import make_progress

__all__ = ["CaptureProgress"]

_WIDE = 100
"""Columns of a terminal from which on the queue is shown: with fewer, the times would be cut off."""


class CaptureProgress:
    """Shows the share of tokens done, shards, tokens per second, documents waiting for the encoder, and time left.

    Args:
        what: what is done.
        tokens, shards: totals.
        done_tokens, done_shards: completed by earlier runs.
        shown: whether to show anything.
    """

    def __init__(
        self, what: str, tokens: int, shards: int, *, done_tokens: int = 0, done_shards: int = 0, shown: bool
    ) -> None:
        self._shards, self._done_shards = shards, done_shards
        self._before, self._now = done_tokens, 0
        self._started = time.perf_counter()
        console = Console(stderr=True)
        self._wide = console.width >= _WIDE
        self._bar = make_progress(
            TextColumn(what),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            shown=shown,
            notebook=shown,
            transient=False,
        )
        self._task = self._bar.add_task("", total=max(tokens, 1), completed=done_tokens, state="")

    def __enter__(self) -> CaptureProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def scored(self, tokens: int, waiting: int, room: int) -> None:
        """Report that the teacher has scored a document, and that `waiting` of `room` queue slots are taken.

        Without a queue, `room` is 0. Narrow terminals have no room for it.
        """
        self._now += tokens
        rate = self._now / max(time.perf_counter() - self._started, 1e-9)
        queue = f", queue {waiting}/{room}" if room and self._wide else ""
        state = f"{rate:,.0f} tokens/s, shard {self._done_shards + 1}/{self._shards}{queue}"
        self._bar.update(self._task, completed=self._before + self._now, state=state)

    def finished_shard(self) -> None:
        """Report that the teacher has scored a shard."""
        self._done_shards += 1
