"""`distillkit-codec verify`: check a dataset against its hashes and checksums."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from distillkit.cli.common import CONFIG, JSON, SPLIT
from distillkit.console import number_of, progress_bar, say
from distillkit.errors import DistillKitError
from distillkit.shards import verify_dataset

__all__ = ["verify"]


@click.command(short_help="Check every hash, checksum and row of a dataset.")
@click.argument("path")
@CONFIG
@SPLIT
@JSON
def verify(path: str, config: str | None, split: str | None, as_json: bool) -> None:
    """Check the dataset at PATH: compare the manifest with the files, check every hash and checksum, decode every row.

    If anything is wrong, the exit status is 1, and each problem is reported with its file and document.
    """
    with progress_bar("checking documents") as progress:
        report = verify_dataset(path, config=config, split=split, progress=progress)
    if as_json:
        click.echo(json.dumps({**asdict(report), "ok": report.ok}, indent=2))
    else:
        counted = ("files", "file"), ("documents", "document"), ("tokens", "token"), ("rows", "row")
        found = ", ".join(number_of(getattr(report, name), noun) for name, noun in counted)
        say(f"{'valid' if report.ok else 'valid part'}: {found}")
    if not report.ok:
        count = len(report.problems)
        heading = f"{number_of(count, 'file')} of {path} damaged"
        raise DistillKitError("\n".join((heading, *report.problems)))
