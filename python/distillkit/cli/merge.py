"""`distillkit merge`: average the distributions of several captures of the same documents."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import get_args

import click

from distillkit.cli.common import Choice, facts_table
from distillkit.cli.convert import output_codec, wanted_codec
from distillkit.console import progress_bar, show
from distillkit.shards import Dataset, load_prior
from distillkit.shards.merge import Average
from distillkit.shards.merge import merge as merge_datasets

__all__ = ["merge"]


@click.command(short_help="Average the distributions of several captures.")
@click.argument("sources", nargs=-1, required=True)
@click.argument("destination", type=click.Path(file_okay=False))
@click.option(
    "--weights",
    metavar="W,W,…",
    help="A positive number for each of SOURCES, in their order, separated by commas; only their ratios matter. Equal "
    "ones by default.",
)
@click.option(
    "--in",
    "average",
    type=Choice(get_args(Average)),
    default="probabilities",
    show_default=True,
    help="What is averaged: probabilities (a mixture: likely is what is likely for any teacher), or logits (the "
    "geometric mean, renormalised: likely is what is likely for all).",
)
@click.option(
    "--common", is_flag=True, help="Leave out documents that not all of SOURCES have, instead of refusing them."
)
@output_codec
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def merge(
    sources: tuple[str, ...],
    destination: str,
    weights: str | None,
    average: Average,
    common: bool,
    preset_name: str | None,
    compression_config: str | None,
    prior: str | None,
    prior_rows: int,
    standalone: bool,
    shard_tokens: int,
    as_json: bool,
) -> None:
    """Average the distributions of SOURCES, captures of the same documents by different teachers, into a new dataset at
    DESTINATION.

    The teachers need the same tokenizer. Documents are matched by their content, whatever their order. Ids that not all
    teachers have stored are treated as docs/several.md says; the report has a bound of what this can change. The codec
    is that of the first source unless --preset or --compression-config names another. What was written is read back and
    checked; an interrupted merge resumes after its last complete shard.

    \b
    Examples:
      distillkit merge captured-a/ captured-b/ merged/
      distillkit merge captured-a/ captured-b/ merged/ --weights 2,1 --in logits --preset compact-128
    """
    datasets = [Dataset.open(source) for source in sources]
    size = max(dataset.codec.vocab_size for dataset in datasets)
    with _progress() as progress:
        report = merge_datasets(
            datasets,
            destination,
            weights=None if weights is None else _parsed(weights),
            average=average,
            config=wanted_codec(lambda: size, preset_name, compression_config),
            prior=None if prior is None else load_prior(prior),
            prior_rows=prior_rows,
            common=common,
            standalone=standalone,
            shard_tokens=shard_tokens,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        show(facts_table(report))


def _parsed(weights: str) -> list[float]:
    try:
        return [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise click.BadParameter(f"{weights!r} is not a list of numbers such as 2,1", param_hint="--weights") from None


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show one progress bar after the other, for each thing that is done."""
    bars: dict[str, Callable[[int, int], None]] = {}
    with contextlib.ExitStack() as stack:

        def advance(what: str, done: int, total: int) -> None:
            if what not in bars:
                stack.close()
                bars[what] = stack.enter_context(progress_bar(_DOING[what]))
            bars[what](done, total)

        yield advance


_DOING = {
    "comparing": "comparing documents",
    "learning": "reading distributions to learn from",
    "merging": "merging documents",
    "verifying": "reading back",
}
