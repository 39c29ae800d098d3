"""`distillkit train`: a training run from its configuration."""

from __future__ import annotations

import contextlib
import difflib
import gc
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click
from rich import filesize
from rich.table import Table

from distillkit.cli.common import output
from distillkit.errors import ConfigError

__all__ = ["summary_table", "train"]

# Rows of the table of evaluations: metric, label, format.
_MEASURES = (
    ("eval_kl", "KL(teacher ‖ student)", "{:.4f}"),
    ("eval_cross_entropy", "cross-entropy", "{:.4f}"),
    ("eval_perplexity", "perplexity", "{:,.2f}"),
    ("eval_top1_agreement", "same first token as the teacher", "{:.1%}"),
    ("eval_student_mass", "probability on the stored tokens", "{:.1%}"),
)


@click.command(short_help="Train a student (the default command).")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-v", "--verbose", count=True, help="More of the libraries' own logging: -v for INFO, -vv for DEBUG.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def train(config: Path, verbose: int, as_json: bool) -> None:
    """Train a student as the YAML file CONFIG says.

    Checkpoints, metrics.jsonl, summary.json, report.md with its plots, and the trained student go to the
    configuration's output_path.
    """
    if not config.is_file():
        near = difflib.get_close_matches(str(config), ["train", "capture"], n=1)
        hint = f"; did you mean the command '{near[0]}'?" if near else ""
        raise ConfigError(f"{config}: there is no such configuration file{hint}")
    first = os.environ.get("RANK", "0") == "0"
    if verbose:
        logging.getLogger().setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
    if not first:
        logging.getLogger("distillkit").setLevel(logging.WARNING)
    from distillkit.config import load_config

    run = load_config(config)
    from transformers.utils.logging import disable_progress_bar

    from distillkit.trainer import train as train_student

    # Their bars for loading and saving run into ours.
    disable_progress_bar()
    # Trackers print to stdout; the summary is to be alone there.
    with contextlib.redirect_stdout(sys.stderr):
        summary = train_student(run)
    _leave_process_group()
    if not first:
        return
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        output().print(summary_table(summary))


def _leave_process_group() -> None:
    """Let go of the other processes together: one that exits first would take connections from those still in use.

    The wrapped student holds the group, in reference cycles. Were it left to the interpreter's end, the group's threads
    could ask for Python after it is gone, which aborts the process.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        gc.collect()
        distributed.destroy_process_group()


def summary_table(summary: dict[str, Any]) -> Table:
    """Lay out a run's summary for a person: what it took, and what it brought on the held-out documents."""
    table = Table(title=f"trained: {summary['output_path']}", title_justify="left", show_header=False)
    cuda = f", {filesize.decimal(summary['peak_cuda_bytes'])} on the GPU" if summary["peak_cuda_bytes"] else ""
    speed = f"{summary['train_tokens']:,} ({summary['tokens_per_second']:,.0f} a second)"
    table.add_row("steps", f"{summary['steps']:,}")
    table.add_row("tokens", speed)
    if summary["cut_documents"]:
        table.add_row("cut", f"{summary['cut_documents']:,} documents, {summary['cut_tokens']:,} tokens")
    table.add_row("time", f"{summary['seconds']:,.1f} s")
    table.add_row("waiting for data", f"{summary['data_wait']:.1%} of the training time")
    table.add_row("peak memory", f"{filesize.decimal(summary['peak_rss_bytes'])}{cuda}")
    first, last = summary["eval_first"], summary["eval_last"]
    for name, label, form in _MEASURES if last is not None else ():
        value = form.format(last[name])
        before = f"{form.format(first[name])} (step {first['step']}) → " if first["step"] != last["step"] else ""
        table.add_row(label, f"{before}{value}")
    table.add_row("report", str(Path(summary["output_path"]) / "report.md"))
    return table
