"""`distillkit pack`: write a captured or published dataset as packed rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, get_args

import click
from rich.table import Table

from distillkit.cli.common import CONFIG, LARGEST, SPLIT, Choice
from distillkit.console import number_of, progress_bar, show
from distillkit.shards.reader import Dataset
from distillkit.shards.repack import PackReport, pack_dataset
from distillkit.types import Overflow

__all__ = ["MAX_LEN", "SHUFFLE_SEED", "pack", "run_pack", "table_of", "window_option"]

# Options shared with the published spelling of the command, distillkit.pack_logits.
MAX_LEN = click.option("--max-len", required=True, type=click.IntRange(2, LARGEST), help="Tokens per row.")
SHUFFLE_SEED = click.option("--shuffle-seed", type=click.IntRange(min=0), help="Shuffle the documents before packing.")


def window_option(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the option for how many documents are packed together."""
    return click.option(
        name,
        type=click.IntRange(1, LARGEST),
        default=10_000,
        show_default=True,
        help="Number of documents packed together; all of them are held in memory.",
    )


@click.command(short_help="Write a dataset's documents packed in full rows.")
@click.argument("source")
@click.argument("output")
@MAX_LEN
@SPLIT
@CONFIG
@click.option(
    "--overflow",
    type=Choice(get_args(Overflow)),
    help="What to do with longer documents: cut them, split them into pieces that repeat an eighth of a row as "
    "context, or drop them. By default they are cut, if that takes at most 5% of all tokens; otherwise nothing is "
    "packed.",
)
@SHUFFLE_SEED
@window_option("--window")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def pack(
    source: str,
    output: str,
    max_len: int,
    split: str | None,
    config: str | None,
    overflow: Overflow | None,
    shuffle_seed: int | None,
    window: int,
    as_json: bool,
) -> None:
    """Pack the documents of the dataset SOURCE into rows of at most --max-len tokens, and write them as shards to
    OUTPUT.

    Only needed if you want packed rows on disk: training packs by itself with `packing: true` in its training_args.
    Documents stay separate within a row, the teacher's bytes are not re-encoded, and everything is read back and
    compared at the end. An interrupted run resumes after its last complete shard.
    """
    dataset = Dataset.open(source, config=config, split=split)
    report = run_pack(dataset, output, max_len, overflow=overflow, seed=shuffle_seed, window=window)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        show(table_of(report))


def run_pack(dataset: Dataset, output: str, max_len: int, **options: Any) -> PackReport:
    """Pack with a progress bar; options as for `pack_dataset`."""
    with progress_bar("packing") as progress:
        return pack_dataset(dataset, output, max_len, progress=progress, **options)


def table_of(report: PackReport) -> Table:
    """Format the report."""
    table = Table(title=f"packed: {report.output}", show_header=False, title_justify="left")
    left_out = f"  ({report.left_out:,} of one token left out)" if report.left_out else ""
    resumed = f"  ({report.resumed_rows:,} from an earlier run)" if report.resumed_rows else ""
    table.add_row("documents", f"{report.documents:,}{left_out}")
    for name, count in (("left out as too long", report.dropped), ("split into pieces", report.split)):
        if count:
            table.add_row(name, number_of(count, "document"))
    if report.cut_documents:
        table.add_row("cut", f"{number_of(report.cut_documents, 'document')}, {number_of(report.cut_tokens, 'token')}")
    table.add_row("rows", f"{report.rows:,}{resumed}")
    table.add_row("tokens", f"{report.tokens:,}  (rows {report.fill:.1%} full)")
    table.add_row("time", f"{report.seconds:,.1f} s, with every document read back and compared")
    return table
