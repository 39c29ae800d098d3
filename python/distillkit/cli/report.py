"""`distillkit report`: report on training runs, from the files in their output folders."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.table import Table

from distillkit.cli.common import HTML, check_writable
from distillkit.console import say, show

__all__ = ["report"]


@click.command(short_help="Write a run's report, or compare several runs.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", "folder", type=click.Path(path_type=Path), help="Write the comparison to this folder.")
@HTML
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def report(runs: tuple[Path, ...], folder: Path | None, page: Path | None, as_json: bool) -> None:
    """Write report.md and its plots to the output folder of a training run, even if the run was killed.

    Several RUNS are printed side by side, and nothing is written to their folders; with --output, comparison.md and
    comparison.png are written to that folder.

    With --html, one page is written instead, for one run or several: results, curves whose values can be read off, the
    held-out documents and tokens at which student and teacher differ most, configuration and cost. The page needs no
    other file and no network. It has texts of the held-out documents.
    """
    if page is not None:
        check_writable(page, ".html", "--html")
    from distillkit.reports.run_record import read_run
    from distillkit.reports.run_report import comparison, names_of, write_comparison, write_report

    records = [read_run(run) for run in runs]
    if folder is not None and len(records) == 1:
        raise click.UsageError("--output is for comparing several runs; a single run's report goes to its own folder")
    written = [] if folder is None else write_comparison(records, folder)
    if page is not None:
        from distillkit.reports.html import write_page
        from distillkit.reports.run_page import run_page

        write_page(page, run_page(records))
        written.append(page)
    elif len(records) == 1:
        written = write_report(records[0])
    rows, names = comparison(records), names_of(records)
    if as_json:
        content = {
            name: {"path": str(record.folder), "finished": record.summary is not None, **record.figures()}
            for name, record in zip(names, records, strict=True)
        }
        click.echo(json.dumps(content, indent=2))
        return
    table = Table(show_edge=False, pad_edge=False)
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for label, values in rows:
        table.add_row(label, *values)
    show(table)
    for path in written:
        say(f"written: {path}")
