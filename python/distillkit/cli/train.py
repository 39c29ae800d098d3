"""`distillkit train`: train a student from a configuration."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from distillkit.cli.common import SET
from distillkit.configuration.overrides import Overrides, parse_overrides
from distillkit.console import figure, human_bytes, number_of, quiet_libraries, say, show
from distillkit.errors import ConfigError
from distillkit.training.dry_run import DryRun, dry_run

__all__ = ["summary_table", "train"]

# Evaluation metrics in the summary table: metric, label, format.
_MEASURES = (
    ("eval_kl", "KL(teacher ‖ student)", "{:.4f}"),
    ("eval_kl_with_rest", "with all other tokens as one outcome", "{:.4f}"),
    ("eval_cross_entropy", "cross-entropy", "{:.4f}"),
    ("eval_perplexity", "perplexity", "{:,.2f}"),
    ("eval_top1_agreement", "top-1 agreement with the teacher", "{:.1%}"),
    ("eval_student_mass", "probability on the stored tokens", "{:.1%}"),
)


@click.command(short_help="Train a student (the default command).")
@click.argument("config", type=click.Path(path_type=Path))
@SET
@click.option("--dry-run", "checks_only", is_flag=True, help="Check everything, up to the first batch; train nothing.")
@click.option("-v", "--verbose", count=True, help="Show the libraries' own logs: -v for INFO, -vv for DEBUG.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary, or the checks, as JSON.")
@click.pass_context
def train(
    context: click.Context,
    config: Path,
    overrides: tuple[str, ...],
    checks_only: bool,
    verbose: int,
    as_json: bool,
) -> None:
    """Train a student as configured in the YAML file CONFIG.

    Checkpoints, metrics.jsonl, summary.json, report.md with its plots, and the trained student go to the
    configuration's output_path. With --dry-run nothing is written there, and the exit status is 1 if training would
    fail.
    """
    if config.is_dir():
        raise ConfigError(f"{config}: expected a YAML file with the configuration, found a folder")
    if not config.exists():
        raise ConfigError(f"{config}: there is no such configuration file")
    changes = parse_overrides(overrides)
    first = os.environ.get("RANK", "0") == "0"
    if verbose:
        logging.getLogger().setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
    if not first or (checks_only and not verbose):
        logging.getLogger("distillkit").setLevel(logging.WARNING)
    # Libraries and trackers print to stdout, which is only for the result.
    with contextlib.redirect_stdout(sys.stderr):
        result = dry_run(config, changes) if checks_only else _train(config, changes)
        _leave_process_group()
    content = result.to_dict() if isinstance(result, DryRun) else result
    if first and as_json:
        click.echo(json.dumps(content, indent=2))
    elif first and isinstance(result, DryRun):
        _show_checks(config, result)
    elif first:
        show(summary_table(content))
    if isinstance(result, DryRun) and not result.ok:
        context.exit(1)


def _train(config: Path, overrides: Overrides) -> dict[str, Any]:
    from distillkit.training.config.file import load_config
    from distillkit.training.config.surroundings import check_surroundings

    run = load_config(config, overrides)
    # Before the slow imports below.
    check_surroundings(run)
    quiet_libraries()
    from distillkit.training.run import train as train_student

    return train_student(run)


# The mark of a check by its outcome, where the terminal has the character and where not, with its style.
_MARKS = {
    "passed": ("✓", "ok", "green"),
    "warning": ("!", "!", "yellow"),
    "failed": ("✗", "FAILED", "bold red"),
    "not checked": ("·", "-", "dim"),
}


def _show_checks(config: Path, result: DryRun) -> None:
    """Print a dry run: one line per check, with a mark, and what training would write."""
    try:
        "✓✗·".encode(sys.stdout.encoding or "ascii")
        plain = False
    except UnicodeEncodeError:
        plain = True
    table = Table(title=f"dry run: {config}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in result.checks:
        character, word, style = _MARKS[check.status]
        table.add_row(Text(word if plain else character, style), check.name, check.detail)
    show(table)
    failed = [check.name for check in result.checks if check.status == "failed"]
    if failed:
        say(f"training would not run: {', '.join(failed)}")
        return
    say("all checks passed. Nothing was trained or written to the output folder; training would write:")
    width = max(len(path) for path, _ in result.would_write)
    for path, what in result.would_write:
        say(f"  {path:<{width}}  {what}")


def _leave_process_group() -> None:
    """Destroy the process group at the same time in all processes: one that exits early would close connections that
    others still use.

    The wrapped student keeps the group alive in reference cycles. If it lived until the interpreter's exit, the group's
    threads could call into Python after its finalisation, which aborts the process.
    """
    if "torch" not in sys.modules:
        return
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        gc.collect()
        distributed.destroy_process_group()


def summary_table(summary: dict[str, Any]) -> Table:
    """Format a run's summary as a table: its cost, and the metrics on the held-out documents."""
    table = Table(title=f"trained: {summary['output_path']}", title_justify="left", show_header=False)
    cuda = f", {human_bytes(summary['peak_cuda_bytes'])} on the GPU" if summary["peak_cuda_bytes"] else ""
    speed = f"{summary['train_tokens']:,} ({summary['tokens_per_second']:,.0f} per second)"
    table.add_row("steps", f"{summary['steps']:,}")
    table.add_row("tokens", speed)
    if summary["cut_documents"]:
        table.add_row(
            "cut", f"{number_of(summary['cut_documents'], 'document')}, {number_of(summary['cut_tokens'], 'token')}"
        )
    table.add_row("time", f"{summary['seconds']:,.1f} s")
    table.add_row("waiting for data", f"{summary['data_wait']:.1%} of the training time")
    if "teacher_wait" in summary:
        table.add_row("waiting for the teacher", f"{summary['teacher_wait']:.1%} of the training time")
    table.add_row("peak memory", f"{human_bytes(summary['peak_rss_bytes'])}{cuda}")
    first, last = summary["eval_first"], summary["eval_last"]
    for name, label, form in _MEASURES if last is not None else ():
        value = figure(last[name], form)
        before = f"{figure(first[name], form)} (step {first['step']}) → " if first["step"] != last["step"] else ""
        table.add_row(label, f"{before}{value}")
    table.add_row("report", str(Path(summary["output_path"]) / "report.md"))
    return table
