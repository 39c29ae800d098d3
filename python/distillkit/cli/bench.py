"""`distillkit-codec bench`: the codec's fidelity and speed on this machine."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING

import click
from rich.console import Group

from distillkit import __version__
from distillkit.cli.common import JSON, LARGEST
from distillkit.codec.presets import FIXED_PRESETS, fixed_preset
from distillkit.console import progress_bar, say, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distillkit.bench.fidelity import FidelityRow
    from distillkit.bench.learned import LearnedPreset
    from distillkit.bench.sample import Sample
    from distillkit.bench.speed import SpeedRow

__all__ = ["bench"]

_QUICK_ROWS = 256


@click.command(short_help="Measure the codec's fidelity and speed.")
@click.option(
    "--sample",
    metavar="DATASET",
    help="Your own rows: a captured or published dataset, or an .npz file with ids and logprobs of shape (rows, k).",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(256, LARGEST),
    help="Vocabulary size of codecs and dense logits (default: the sample's; 151,936 logits without --sample).",
)
@click.option(
    "--quick", is_flag=True, help="Shorter runs and fewer rows: seconds instead of a minute, but less accurate."
)
@JSON
def bench(sample: str | None, vocab_size: int | None, quick: bool, as_json: bool) -> None:
    """Measure the fidelity and speed of the codec, on this machine and with your own data.

    The first table compares decoded distributions with the originals for each preset: with our encoder, with the
    published one, and with the best that the layout allows. Compact presets learn their prior from three quarters of
    the documents, and are measured on the others. Without --sample, the originals are a few hundred real positions that
    come with distillkit: too few for a good prior, so compact rows take more bytes than those of a real dataset.

    The second table compares the speed of encoding, decoding and reading with the published algorithm in batched torch,
    and with the time this machine takes to copy or read the same number of bytes. Results are checked before they are
    timed.

    Without torch there is only the first table, of our encoder alone.
    """
    from distillkit.bench.fidelity import measure_fidelity
    from distillkit.bench.learned import learn_presets
    from distillkit.bench.machine import machine
    from distillkit.bench.sample import bundled_sample, load_sample

    rows = bundled_sample() if sample is None else load_sample(sample)
    if quick:
        rows = rows.first(_QUICK_ROWS)
    codec_size = vocab_size or rows.vocab_size
    configs = {name: fixed_preset(name, vocab_size=codec_size) for name in FIXED_PRESETS}
    has_torch = importlib.util.find_spec("torch") is not None
    with progress_bar("measuring fidelity") as progress:
        fidelity = list(measure_fidelity(rows, configs, progress, ours_only=not has_torch))
    with progress_bar("learning priors") as progress:
        learned, skipped = learn_presets(rows, codec_size, progress)
    fidelity += [*(each.fidelity() for each in learned), *skipped]
    dense = vocab_size or (rows.vocab_size if sample else None)
    speed = _speed(rows, learned, codec_size, dense, quick) if has_torch else []
    if as_json:
        facts = {"rows": len(rows), "k": rows.k, "vocab_size": rows.vocab_size, "about": rows.about}
        found = {
            "machine": machine(),
            "version": __version__,
            "sample": {**facts, "caution": rows.caution},
            "fidelity": [row.to_dict() for row in fidelity],
            "speed": [row.to_dict() for row in speed],
        }
        click.echo(json.dumps(found, indent=2, allow_nan=False))
    else:
        _show(fidelity, speed, rows)


def _speed(
    rows: Sample, learned: Sequence[LearnedPreset], vocab_size: int, dense_vocab_size: int | None, quick: bool
) -> list[SpeedRow]:
    from distillkit.bench.speed import DENSE_VOCABULARY, measure_speed

    with progress_bar("measuring speed") as progress:
        measured = measure_speed(
            rows,
            vocab_size=vocab_size,
            dense_vocab_size=dense_vocab_size or DENSE_VOCABULARY,
            learned=learned,
            quick=quick,
            progress=progress,
        )
        return list(measured)


def _show(fidelity: list[FidelityRow], speed: list[SpeedRow], rows: Sample) -> None:
    from distillkit.bench.tables import fidelity_table, speed_table

    if speed:
        show(Group(fidelity_table(fidelity, rows), "", speed_table(speed)))
        return
    show(fidelity_table(fidelity, rows))
    say("\nFor the published encoder, the limits of the layouts and the speed: pip install 'distillkit[capture]'")
