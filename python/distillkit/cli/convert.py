"""`distillkit-codec convert`: a dataset as shards, without loss or in another codec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import click

from distillkit.cli.common import CONFIG, LARGEST, SPLIT, Choice
from distillkit.codec import Codec, CodecConfig, preset
from distillkit.codec.fidelity import FidelityStats
from distillkit.codec.presets import PresetName
from distillkit.configuration.places import folder_name
from distillkit.console import human_bytes, number_of, progress_bar, say
from distillkit.shards import Dataset, Manifest, load_prior
from distillkit.shards.convert import PRIOR_ROWS, target_codec
from distillkit.shards.convert import convert as convert_dataset
from distillkit.shards.published import load_codec_config

__all__ = ["convert", "output_codec", "wanted_codec"]


Command = Callable[..., Any]


def output_codec(command: Command) -> Command:
    """Add the options that say in which codec distributions are written."""
    for option in reversed(_OUTPUT_CODEC):
        command = option(command)
    return command


_OUTPUT_CODEC = (
    click.option("--preset", "preset_name", type=Choice(get_args(PresetName)), help="Write this codec."),
    click.option(
        "--compression-config",
        type=click.Path(dir_okay=False),
        help="Write the codec in this YAML file, instead of a preset.",
    ),
    click.option(
        "--prior",
        help="A prior for the compact format: a prior.bin, or a dataset of the same teacher. If it was learned for "
        "another configuration, it is adapted to this one. By default, a prior is learned from the distributions that "
        "are written.",
    ),
    click.option(
        "--prior-rows",
        type=click.IntRange(1, LARGEST),
        default=PRIOR_ROWS,
        show_default=True,
        help="Learn the prior from this many distributions, evenly spread. Each takes 12 bytes of memory per id.",
    ),
    click.option(
        "--standalone",
        is_flag=True,
        help="Put the prior into each shard as well, so that a shard can be read without the folder; about 1 MB each.",
    ),
    click.option(
        "--shard-tokens", type=click.IntRange(1, LARGEST), default=262_144, show_default=True, help="Tokens per shard."
    ),
)


@click.command(short_help="Convert a dataset to shards, without loss or to another codec.")
@click.argument("source")
@click.argument("destination", type=click.Path(file_okay=False))
@CONFIG
@SPLIT
@output_codec
@click.option(
    "--tokenizer", help="The teacher's tokenizer (folder or hub id), which training compares with the student's."
)
@click.option("--teacher", help="The teacher's name, for the header.")
def convert(
    source: str,
    destination: str,
    config: str | None,
    split: str | None,
    preset_name: str | None,
    compression_config: str | None,
    prior: str | None,
    prior_rows: int,
    standalone: bool,
    shard_tokens: int,
    tokenizer: str | None,
    teacher: str | None,
) -> None:
    """Convert the dataset at SOURCE to self-describing shards with checksums at DESTINATION.

    Without --preset or --compression-config, every distribution is kept byte for byte, as of a published dataset. With
    one of them, all distributions are decoded and encoded again: the first k ids of each are kept, and the probability
    of the others counts as missing. The fidelity that is then shown and recorded compares with the decoded
    distributions of SOURCE, since those of the teacher are not at hand.

    \b
    Examples:
      distillkit-codec convert published/ shards/
      distillkit-codec convert captured/ smaller/ --preset compact-50
      distillkit-codec convert captured/ smaller/ --preset compact-128 --prior another-dataset/
    """
    dataset = Dataset.open(source, config=config, split=split)
    wanted = wanted_codec(lambda: dataset.codec.vocab_size, preset_name, compression_config)
    if wanted is None and prior is not None:
        raise click.UsageError("--prior is for the compact format: choose it with --preset or --compression-config")
    facts, vocab_size = _tokenizer_facts(tokenizer)
    codec = None
    if wanted is not None:
        given = None if prior is None else load_prior(prior)
        with progress_bar("reading rows to learn from") as learning:
            codec = target_codec(
                dataset, wanted, folder=destination, prior=given, prior_rows=prior_rows, progress=learning
            )
    total, done = dataset.num_tokens, 0
    with progress_bar("converting tokens") as progress:

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(done, total)

        manifest = convert_dataset(
            dataset,
            destination,
            codec=codec,
            shard_tokens=shard_tokens,
            vocab_size=vocab_size,
            tokenizer=facts,
            teacher=None if teacher is None else {"name": teacher, "revision": None, "dtype": None},
            standalone=standalone,
            progress=advance,
        )
    _tell(dataset, destination, manifest, codec)


def wanted_codec(
    vocab_size: Callable[[], int], preset_name: str | None, compression_config: str | None
) -> CodecConfig | None:
    """The codec configuration that the options of `output_codec` name; None if they name none.

    Only a preset needs the size of the vocabulary.
    """
    if preset_name is not None and compression_config is not None:
        raise click.UsageError("set --preset or --compression-config, not both")
    if preset_name is not None:
        return preset(preset_name, vocab_size=vocab_size())
    return None if compression_config is None else load_codec_config(compression_config)


def _tell(dataset: Dataset, destination: str, manifest: Manifest, codec: Codec | None) -> None:
    """Say what was written, how large it is, and how close to the source."""
    documents, tokens = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("documents", "tokens"))
    written = dataset.codec if codec is None else codec
    prior, source_prior = (0 if each.prior is None else len(each.prior.data) for each in (written, dataset.codec))
    size, before = (sum(shard.bytes for shard in shards) for shards in (manifest.shards, dataset.shards))
    size, before = size + prior, before + source_prior
    content = f"{number_of(documents, 'document')}, {number_of(tokens, 'token')}"
    say(f"{content} in {number_of(len(manifest.shards), 'shard')}: {destination}")
    sizes = f"{human_bytes(size)}, from {human_bytes(before)}"
    if written == dataset.codec:
        say(f"{sizes}; every distribution unchanged, byte for byte")
        return
    rows = max(dataset.num_rows, 1)
    say(f"{sizes}: {size / rows:,.1f} bytes per distribution, from {before / rows:,.1f}")
    if prior:
        say(f"prior.bin: {human_bytes(prior)} of them, once per dataset")
    if manifest.header.fidelity is not None:
        stats = FidelityStats.from_dict(manifest.header.fidelity)
        say(
            f"KL {stats.kl_mean:.2e} on average, {stats.kl_p99:.2e} at p99, against the decoded distributions of "
            f"{dataset.path} (not the teacher's own)"
        )


def _tokenizer_facts(name: str | None) -> tuple[dict[str, Any] | None, int | None]:
    if name is None:
        return None, None
    from distillkit.text.tokenizer import fingerprint, load_tokenizer, vocab_size

    tokenizer = load_tokenizer(name)
    return {"name": folder_name(name), "fingerprint": fingerprint(tokenizer)}, vocab_size(tokenizer)
