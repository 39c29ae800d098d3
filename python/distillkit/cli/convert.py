"""`distillkit-codec convert`: a published dataset as shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from distillkit.cli.common import CONFIG, LARGEST, SPLIT
from distillkit.console import human_bytes, number_of, progress_bar, say
from distillkit.shards import Dataset
from distillkit.shards.convert import convert as convert_dataset

__all__ = ["convert"]


@click.command(short_help="Convert a published dataset to shards, without loss.")
@click.argument("source")
@click.argument("destination", type=click.Path(file_okay=False))
@CONFIG
@SPLIT
@click.option(
    "--shard-tokens", type=click.IntRange(1, LARGEST), default=262_144, show_default=True, help="Tokens per shard."
)
@click.option(
    "--tokenizer", help="The teacher's tokenizer (folder or hub id), which training compares with the student's."
)
@click.option("--teacher", help="The teacher's name, for the header.")
def convert(
    source: str,
    destination: str,
    config: str | None,
    split: str | None,
    shard_tokens: int,
    tokenizer: str | None,
    teacher: str | None,
) -> None:
    """Convert the published dataset at SOURCE to self-describing shards with checksums at DESTINATION, without loss."""
    dataset = Dataset.open(source, config=config, split=split)
    facts, vocab_size = _tokenizer_facts(tokenizer)
    total, done = dataset.num_tokens, 0
    with progress_bar("converting tokens") as progress:

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(done, total)

        manifest = convert_dataset(
            dataset,
            destination,
            shard_tokens=shard_tokens,
            vocab_size=vocab_size,
            tokenizer=facts,
            teacher=None if teacher is None else {"name": teacher, "revision": None, "dtype": None},
            progress=advance,
        )
    documents, tokens = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("documents", "tokens"))
    size = human_bytes(sum(shard.bytes for shard in manifest.shards))
    before = human_bytes(sum(shard.bytes for shard in dataset.shards))
    content = f"{number_of(documents, 'document')}, {number_of(tokens, 'token')}"
    say(f"{content} in {number_of(len(manifest.shards), 'shard')}: {destination}")
    say(f"{size}, from {before}; every distribution unchanged, byte for byte")


def _tokenizer_facts(name: str | None) -> tuple[dict[str, Any] | None, int | None]:
    if name is None:
        return None, None
    from distillkit.text.tokenizer import fingerprint, load_tokenizer, vocab_size

    tokenizer = load_tokenizer(name)
    label = Path(name).resolve().name if Path(name).exists() else name
    return {"name": label, "fingerprint": fingerprint(tokenizer)}, vocab_size(tokenizer)
