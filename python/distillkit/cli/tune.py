"""`distillkit-codec tune`: the codec configuration for a number of bytes, on a teacher's own rows."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import click

from distillkit.cli.common import JSON, LARGEST, check_writable
from distillkit.console import progress_bar, say, show

__all__ = ["tune"]

_POSITIVE = click.FloatRange(0, min_open=True)


@click.command(short_help="Find the codec configuration for a number of bytes.")
@click.argument("sample")
@click.option("--bytes", "most_bytes", type=_POSITIVE, help="Choose the least KL in at most so many bytes per row.")
@click.option("--kl", "most_kl", type=_POSITIVE, help="Choose the fewest bytes with at most this KL (nats per row).")
@click.option(
    "--stored-kl",
    type=_POSITIVE,
    default=5e-3,
    show_default=True,
    help="Leave out configurations with more KL than this over the ids that they store and the rest.",
)
@click.option(
    "--k",
    type=click.IntRange(1, LARGEST),
    help="Look at the first K ids of each row only: nothing beyond is stored, and KL counts it as one outcome "
    "(default: all of the sample's).",
)
@click.option(
    "--tokens",
    type=click.IntRange(1, LARGEST),
    default=10_000_000,
    show_default=True,
    help="Size of the dataset that one prior is for: each row counts its share of the prior's bytes.",
)
@click.option(
    "--vocab-size", type=click.IntRange(2, LARGEST), help="Width of the teacher's logits (default: the sample's)."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Plot KL over bytes (PNG).")
@click.option(
    "--write", type=click.Path(dir_okay=False, path_type=Path), help="Write what was chosen to this YAML file."
)
@JSON
def tune(
    sample: str,
    most_bytes: float | None,
    most_kl: float | None,
    stored_kl: float,
    k: int | None,
    tokens: int,
    vocab_size: int | None,
    plot: Path | None,
    write: Path | None,
    as_json: bool,
) -> None:
    """Search for the codec configuration that keeps most of a teacher's distributions in so many bytes.

    SAMPLE is a captured dataset, or an .npz file with ids and logprobs of shape (rows, k); best are 20,000 rows of many
    ids, stored exactly. The search covers the compact format (numbers of ids, thresholds and steps) and the published
    layouts. Priors are learned from three quarters of the documents, bytes and KL measured on the others.

    KL of different numbers of stored ids can only be compared over the same outcomes. So that which ranks them is over
    all of the sample's ids and the rest as one more outcome, with the missing mass spread evenly over the ids that are
    not stored. KL over the stored ids and the rest is shown beside it, with the probability that the ids have, and is
    limited by --stored-kl, so that values are not made ever coarser for more ids.

    \b
    Examples:
      distillkit-codec tune captured/ --bytes 60 --write codec.yaml
      distillkit capture config.yaml --compression-config codec.yaml
      distillkit-codec tune captured/ --k 50 --kl 1e-3 --plot frontier.png
    """
    if most_bytes is not None and most_kl is not None:
        raise click.UsageError("set --bytes or --kl, not both")
    target = None
    if most_bytes is not None:
        target = "bytes_per_row", most_bytes
    elif most_kl is not None:
        target = "kl", most_kl
    elif write is not None:
        raise click.UsageError("--write needs --bytes or --kl, to choose a configuration")
    if plot is not None:
        check_writable(plot, ".png", "--plot")
    if write is not None and not os.access(write.absolute().parent, os.W_OK):
        raise click.BadParameter(f"{write.absolute().parent}: not a writable folder", param_hint="--write")
    from distillkit.bench.sample import load_sample
    from distillkit.bench.tune import Split, best, narrowed, search
    from distillkit.bench.tune_report import Tuning

    rows = load_sample(sample)
    rows = rows if vocab_size is None else replace(rows, vocab_size=vocab_size)
    rows = rows if k is None else narrowed(rows, k)
    split = Split.of(rows)
    with progress_bar("measuring configurations") as progress:
        found = search(split, rows.vocab_size, tokens=tokens, target=target, most_stored=stored_kl, progress=progress)
    chosen = None if target is None else best(found, *target)
    tuning = Tuning(rows, split, found, chosen, tokens)
    if plot is not None:
        tuning.plot(plot)
    if write is not None:
        write.write_text(tuning.yaml(), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(tuning.to_dict(), indent=2, allow_nan=False))
        return
    show(tuning.table())
    for what, path in (("plot", plot), ("configuration", write)):
        if path is not None:
            say(f"{what}: {path}")
