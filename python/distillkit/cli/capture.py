"""`distillkit capture`: run a teacher over text once, and store its distributions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.table import Table

from distillkit.capture.preflight import check_before_loading
from distillkit.capture.result import CaptureReport, counted
from distillkit.capture.settings import CaptureSettings
from distillkit.capture.settings_file import load_captures
from distillkit.cli.common import SET, stopping_on_sigterm
from distillkit.cli.setting_options import GroupedCommand, setting_options
from distillkit.configuration.overrides import parse_overrides
from distillkit.console import human_bytes, number_of, quiet_libraries, show

__all__ = ["capture", "capture_options", "chosen_captures", "show_reports"]


def capture_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the settings file, an option for each setting, and output options to a command."""
    path = click.Path(dir_okay=False, path_type=Path)
    for option in (
        click.option("--progress/--no-progress", default=True, help="Show a progress bar (on stderr)."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        SET,
        setting_options(),
        click.argument("config", required=False, metavar="[FILE.yaml]", type=path),
    ):
        command = option(command)
    return command


@click.command(cls=GroupedCommand, short_help="Run a teacher over text and store its distributions.")
@capture_options
@click.pass_context
def capture(context: click.Context, /, config: Path | None, as_json: bool, progress: bool, **options: Any) -> None:
    """Run a teacher over text and store its next-token distributions, compressed.

    Run the same command again to resume an interrupted capture after its last complete shard; a finished one is left
    as it is. Look at the result with: distillkit-codec inspect OUTPUT

    Settings may also come from a YAML file, under the names of the options (max_seq_len: 2048); docs/settings.md lists
    them. To run several captures one after the other, list the settings in which they differ under `captures`. Options
    on the command line override the file.

    \b
    Examples:
      distillkit capture --model teacher/ --dataset text.jsonl --output captured/
      distillkit capture teachers.yaml --samples 1000
    """
    captures = chosen_captures(context, config, options)
    show_reports(captures, as_json=as_json, progress=progress)


def show_reports(captures: Sequence[CaptureSettings], *, as_json: bool = False, progress: bool = True) -> None:
    """Run captures one after the other, and print their reports."""
    for settings in captures:
        check_before_loading(settings)
    quiet_libraries()
    from distillkit.capture.run import run_capture

    reports = []
    with stopping_on_sigterm():
        for settings in captures:
            reports.append(run_capture(settings, progress=progress))
            if not as_json:
                show(_table(reports[-1]))
    if as_json:
        found = [report.to_dict() for report in reports]
        click.echo(json.dumps(found[0] if len(found) == 1 else found, indent=1))


def chosen_captures(
    context: click.Context, config: Path | None, options: dict[str, Any], output: str | None = None
) -> list[CaptureSettings]:
    """Return the captures that the options and the file specify.

    Args:
        context: the command's.
        config: the file, if any.
        options: the values of the command's options.
        output: the output of a capture without a file that names none.

    Raises:
        ConfigError: settings are unknown, missing or not allowed.
        click.UsageError: there is no file, and model, dataset or output is missing.
    """
    changes = parse_overrides(options.pop("overrides"))
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    }
    if config is not None:
        return load_captures(config, given, changes)
    if changes:
        raise click.UsageError("--set changes the values of a file; without one, use the options", ctx=context)
    if output is not None:
        given.setdefault("output", output)
    for name in ("model", "dataset", "output"):
        if name not in given:
            raise click.UsageError(f"Missing option '--{name}', or a file with settings.", ctx=context)
    return [CaptureSettings(**given)]


def _table(report: CaptureReport) -> Table:
    """Format the report as a table."""
    table = Table(title=f"captured: {report.output}", show_header=False, title_justify="left")
    table.add_row("documents", _documents(report))
    rows = number_of(report.rows, "distribution")
    table.add_row("tokens", f"{report.tokens:,}  ({rows} in {number_of(report.shards, 'shard')})")
    if report.unfinished_shards:
        table.add_row(
            "unfinished",
            f"left: {number_of(report.unfinished_shards, 'shard')}; the manifest is written after the last one",
        )
    if report.bytes_per_token:
        table.add_row("bytes per token", _bytes_per_token(report))
    if report.kl_mean is not None and report.kl_p99 is not None:
        table.add_row(
            "fidelity", f"KL mean {report.kl_mean:.2e}, p99 {report.kl_p99:.2e} nats (over the stored ids and the rest)"
        )
    if report.mass_mean is not None:
        shares = ", ".join(
            f"{float(share):.0%} of rows ≤ {mass:.3f}"
            for share, mass in report.mass_quantiles.items()
            if mass is not None
        )
        table.add_row("stored mass", f"mean {report.mass_mean:.4f}; {shares}")
    if report.rows:
        table.add_row("alignment", _alignment(report))
    if report.already_complete:
        table.add_row("this run", "nothing to do: already complete")
    elif not report.new_tokens:
        only = "only the prior was learned" if report.learn_seconds else "only the plan was made"
        table.add_row("this run", f"nothing captured: {only}, or these shards were already complete")
    else:
        speed = f"{report.new_tokens:,} tokens in {report.seconds:,.1f} s: {report.tokens_per_second:,.0f} tokens/s"
        table.add_row("this run", speed)
        table.add_row("stages", _stages(report))
        cuda = f", {human_bytes(report.peak_cuda_bytes)} on the GPU" if report.peak_cuda_bytes else ""
        table.add_row("peak memory", f"{human_bytes(report.peak_rss_bytes)}{cuda}")
    return table


def _bytes_per_token(report: CaptureReport) -> str:
    """Format the codec's bytes per token, compared with the published layout, and the size on disk."""
    disk = f"{human_bytes(report.disk_bytes)} on disk"
    if not report.prior_bytes:
        return f"{report.bytes_per_token:g}  ({disk})"
    published, share = report.published_bytes_per_token, report.prior_bytes / report.rows
    compared = (
        f", {report.bytes_per_token / published:.0%} of the {published} of the published layout" if published else ""
    )
    return (
        f"{report.bytes_per_token:,.1f}{compared}  ({share:,.1f} of them for the prior of "
        f"{human_bytes(report.prior_bytes)}; {disk})"
    )


def _alignment(report: CaptureReport) -> str:
    """Format how often the next token is the teacher's first id, in place and shifted."""
    rates = ", ".join(f"{rate:.1%} at {shift}" for shift, rate in report.next_token_rates.items())
    verdict = "" if report.shifted is None else f". Rows match the tokens at {report.shifted:+d}: THEY ARE SHIFTED"
    return f"the next token is the teacher's first id: {rates}{verdict}"


def _stages(report: CaptureReport) -> str:
    """Format the throughput of each stage while it was working."""
    stages = {
        "teacher": report.teacher_seconds,
        "encode": report.encode_seconds,
        "write": report.write_seconds,
    }
    rates = ", ".join(f"{name} {report.new_tokens / seconds:,.0f}" for name, seconds in stages.items() if seconds > 0)
    learned = f"; learning the prior took {report.learn_seconds:,.1f} s" if report.learn_seconds else ""
    return f"{rates} tokens/s; the teacher waited {report.blocked_seconds:,.1f} s for them{learned}"


def _documents(report: CaptureReport) -> str:
    """Format the number of documents, and what was left out."""
    notes = []
    if report.resumed_documents and not report.already_complete:
        notes.append(f"{report.resumed_documents:,} from an earlier run")
    if report.skipped:
        notes.append(f"{len(report.skipped):,} left out because the teacher cannot score them")
    notes += counted(report.passed_over)
    return f"{report.documents:,}" + (f"  ({', '.join(notes)})" if notes else "")
