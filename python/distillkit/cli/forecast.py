"""`distillkit forecast`: what a capture will cost, and whether it fits."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from distillkit.capture.preflight import check_inputs
from distillkit.capture.result import counted
from distillkit.cli.capture import capture_options, chosen_captures
from distillkit.cli.setting_options import GroupedCommand
from distillkit.configuration.places import new_folder
from distillkit.console import human_bytes, progress_bar, quiet_libraries, say, show
from distillkit.errors import CaptureError

if TYPE_CHECKING:
    from distillkit.capture.forecasting.forecast import (
        CodecForecast,
        Forecast,
        LearningForecast,
        MemoryForecast,
        SpeedForecast,
    )
    from distillkit.capture.forecasting.totals import Amount, TextForecast

__all__ = ["forecast"]

_WORTH_SAYING = 1_000_000
"""Bytes of memory."""


def _a_number(context: click.Context, option: click.Parameter, value: float) -> float:
    # NaN passes any limit.
    if math.isnan(value):
        raise click.BadParameter("must be a number of seconds, found nan")
    return value


@click.command(cls=GroupedCommand, short_help="Estimate what a capture will cost, and whether it fits.")
@capture_options
@click.option(
    "--seconds",
    type=click.FloatRange(0, 86_400),
    callback=_a_number,
    default=10.0,
    show_default=True,
    help="How long to run the teacher, to measure its speed and the fidelity of each codec; 0 only estimates sizes.",
)
@click.pass_context
def forecast(
    context: click.Context, /, config: Path | None, as_json: bool, progress: bool, seconds: float, **options: Any
) -> None:
    """Estimate what a capture with these options will cost (tokens, time, memory and disk), and the fidelity of each
    codec on this text. Nothing is written. --output says whose disk has to have room, by default that of this folder;
    if that capture has begun there, what is left of it is estimated.

    If the capture does not fit, the exit status is 1 and the message says what would fit.

    \b
    Examples:
      distillkit forecast --model teacher/ --dataset text.jsonl
      distillkit forecast teachers.yaml --seconds 0
    """
    captures = chosen_captures(context, config, options, output=new_folder("captured"))
    for settings in captures:
        check_inputs(settings)
    quiet_libraries()
    from distillkit.capture.forecasting.forecast import forecast_captures

    if progress:
        with progress_bar("running the teacher") as advance:
            found = forecast_captures(
                captures, seconds=seconds, progress=lambda done, total: advance(int(done), int(total))
            )
    else:
        found = forecast_captures(captures, seconds=seconds)
    if as_json:
        results = [result.to_dict() for result in found]
        click.echo(json.dumps(results[0] if len(results) == 1 else results, indent=1))
    else:
        for result in found:
            _show(result)
    problems = [problem for result in found for problem in result.problems]
    if problems:
        raise CaptureError(". ".join(problems))


def _show(result: Forecast) -> None:
    show(_summary(result))
    show(_codecs(result.codecs))
    for name, reason in result.left_out.items():
        say(f"not possible: {name}: {reason}")
    notes: dict[str, list[str]] = {}
    for codec in result.codecs:
        if codec.note:
            notes.setdefault(codec.note, []).append(codec.name)
    for note, names in notes.items():
        say(f"not measured: {', '.join(names)}: {note}")


def _summary(result: Forecast) -> Table:
    table = Table(title=f"forecast: {result.output}", show_header=False, title_justify="left")
    _add_text(table, result.text)
    if result.speed is not None:
        _add_speed(table, result.speed)
    _add_memory(table, result.memory)
    chosen, free = result.chosen, result.free_bytes
    if result.learning is not None:
        table.add_row("prior", _learning(result.learning, chosen))
    room = "free space unknown" if free is None else f"{human_bytes(free)} are free"
    if result.reserved_bytes:
        room += f", {human_bytes(result.reserved_bytes)} of them for captures before this one"
    table.add_row("disk", f"{_bytes(chosen.left_bytes)} with {chosen.name}; {room}")
    return table


def _add_text(table: Table, text: TextForecast) -> None:
    read = f"  ({text.sampled_rows:,} of them read for this)" if 0 < text.sampled_rows < text.rows else ""
    table.add_row("rows", f"{text.rows:,}{read}")
    table.add_row("documents", _count(text.documents))
    table.add_row("tokens", _count(text.tokens))
    if text.captured_tokens or text.left_tokens != text.tokens:
        table.add_row(
            "of them",
            f"{text.captured_tokens:,} already captured, {_count(text.left_tokens)} left for this run",
        )
    if text.passed_over:
        table.add_row("", f"{', '.join(counted(text.passed_over))}  (in the rows that were read)")
    if text.duplicates_unknown:
        table.add_row("", "duplicates among unread rows are unknown: there may be fewer tokens")


def _add_speed(table: Table, speed: SpeedForecast) -> None:
    encoder = "" if speed.encoder is None else f", encoder {speed.encoder:,.0f}"
    rates = f"teacher {speed.teacher:,.0f}{encoder} tokens/s, together {speed.tokens_per_second:,.0f}"
    table.add_row("speed", f"{rates}  ({speed.tokens:,} tokens in {speed.seconds:.1f} s)")
    left, finish = speed.left_seconds, datetime.datetime.fromisoformat(speed.finish)
    span = _span(left.value) + ("" if left.exact else f" ({_span(left.low)} to {_span(left.high)})")
    by = f"done {finish:%Y-%m-%d %H:%M} if started now"
    workers = {None: "; with one worker: divide by the number of workers", 1: ""}.get(
        speed.workers, f"; with {speed.workers} workers, each as fast as this machine"
    )
    table.add_row("time", f"{span}, {by}; loading took {speed.load_seconds:.0f} s{workers}")


def _learning(learning: LearningForecast, chosen: CodecForecast) -> str:
    """Format what learning the prior takes."""
    time = "" if learning.seconds is None else f"; that takes about {_span(math.ceil(learning.seconds))}"
    return (
        f"learned from {learning.rows:,} distributions, which are scored first, and take "
        f"{human_bytes(chosen.kept_bytes)} of disk until their shards are complete{time}"
    )


def _add_memory(table: Table, memory: MemoryForecast) -> None:
    if memory.teacher:
        parts = ", ".join(f"{name} {human_bytes(count)}" for name, count in memory.teacher.items())
        free = "" if memory.free_bytes is None else f"; {human_bytes(memory.free_bytes)} are free"
        table.add_row("memory", f"{memory.device}: at least {human_bytes(memory.least)} ({parts}){free}")
    waiting = f"at most {human_bytes(memory.queue_bytes)} of distributions in the queue"
    if memory.duplicates_bytes > _WORTH_SAYING:
        waiting += f", {human_bytes(memory.duplicates_bytes)} to find duplicates"
    table.add_row("" if memory.teacher else "memory", f"this machine: {waiting}")
    if memory.peak_rss_bytes is not None:
        cuda = f", {human_bytes(memory.peak_cuda_bytes)} on the GPU" if memory.peak_cuda_bytes else ""
        table.add_row("", f"the short run's peak: {human_bytes(memory.peak_rss_bytes)}{cuda}")


def _codecs(codecs: Sequence[CodecForecast]) -> Table:
    positions = max(codec.positions for codec in codecs)
    measured = f", on {positions:,} positions of this text" if positions else ""
    table = Table(title=f"codecs{measured}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    headings = ["\nk", "bytes\nper token", "\ndisk", "\nfits"]
    headings += ["stored\nmass", "KL\nmean", "\np99"] if positions else []
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for codec in codecs:
        fits = {None: "?", True: "yes", False: "NO"}[codec.fits]
        size = f"≈ {codec.bytes_per_token}" if codec.estimated else str(codec.bytes_per_token)
        cells = [str(codec.k), size, human_bytes(codec.left_bytes.value), fits]
        if codec.mass_mean is not None:
            cells += [f"{codec.mass_mean:.4f}", f"{codec.kl_mean:.2e}", f"{codec.kl_p99:.2e}"]
        table.add_row(f"{codec.name} (chosen)" if codec.chosen else codec.name, *cells)
    return table


def _count(amount: Amount) -> str:
    """Format a number, with its interval if it is an estimate."""
    return f"{amount.value:,}" + ("" if amount.exact else f"  ({amount.low:,} to {amount.high:,})")


def _bytes(amount: Amount) -> str:
    return human_bytes(amount.value) + (
        "" if amount.exact else f" ({human_bytes(amount.low)} to {human_bytes(amount.high)})"
    )


def _span(seconds: int) -> str:
    """Format a duration: 42 s, 12 min, 3 h 20 min, 5 days 4 h."""
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"
