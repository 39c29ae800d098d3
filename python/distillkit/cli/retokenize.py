"""`distillkit retokenize`: a capture in the tokens of a student with another tokenizer."""

from __future__ import annotations

import json
import os
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from distillkit.cli.common import CONFIG, JSON, SPLIT
from distillkit.cli.convert import output_codec, wanted_codec
from distillkit.codec.fidelity import FidelityStats
from distillkit.console import human_bytes, number_of, progress_bar, quiet_libraries, say, show
from distillkit.retokenize import Retokenization, Settings
from distillkit.retokenize import retokenize as retokenize_dataset

__all__ = ["retokenize"]


@click.command(short_help="Rewrite a capture for a student with another tokenizer.")
@click.argument("source")
@click.argument("destination", type=click.Path(file_okay=False))
@click.option("--student", required=True, help="The student's model or tokenizer: a folder or hub id.")
@click.option("--tokenizer", help="The teacher's tokenizer: a folder or hub id. By default the one that SOURCE names.")
@CONFIG
@SPLIT
@output_codec
@click.option(
    "--processes",
    type=click.IntRange(1, 1024),
    help="How many shards are written at the same time; by default, as many as there are cores.",
)
@click.option("--trust-remote-code", is_flag=True, help="Let the tokenizers run code of their own.")
@JSON
def retokenize(
    source: str,
    destination: str,
    student: str,
    tokenizer: str | None,
    config: str | None,
    split: str | None,
    preset_name: str | None,
    compression_config: str | None,
    prior: str | None,
    prior_rows: int,
    standalone: bool,
    shard_tokens: int,
    processes: int | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Rewrite the capture at SOURCE as one at DESTINATION in the tokens of a student with another tokenizer.

    The text stays the same, byte for byte. At each of the student's positions, the teacher's distribution over its own
    next token becomes one over the student's next token: the probability of each stored token goes to the first of the
    student's tokens of its bytes. What cannot be told counts as missing mass. Training then uses DESTINATION like any
    other capture.

    The codec is that of SOURCE unless an option names another; a --prior is one over the student's ids. The same
    command resumes an interrupted run after its last complete shard.

    \b
    Examples:
      distillkit retokenize captured/ for-student/ --student ./student
      distillkit retokenize captured/ for-student/ --student ./student --preset compact-50
    """
    quiet_libraries()
    settings = Settings(
        source,
        destination,
        student,
        tokenizer=tokenizer,
        codec=wanted_codec(lambda: _vocab_size(student, trust_remote_code), preset_name, compression_config),
        config=config,
        split=split,
        prior=prior,
        prior_rows=prior_rows,
        shard_tokens=shard_tokens,
        standalone=standalone,
        trust_remote_code=trust_remote_code,
    )
    # Rows that a prior is learned from come first, on the same bar: a terminal shows one at a time.
    with progress_bar("retokenising") as progress:
        written = retokenize_dataset(
            settings, processes=processes or os.cpu_count() or 1, learning=progress, progress=progress
        )
    if as_json:
        click.echo(json.dumps(_facts(written, destination), ensure_ascii=False))
    else:
        _tell(written, destination)


def _vocab_size(student: str, trust: bool) -> int:
    """The width of the student's logits."""
    from distillkit.retokenize.sources import head_size
    from distillkit.text.tokenizer import load_tokenizer, vocab_size

    return head_size(student, vocab_size(load_tokenizer(student, trust_remote_code=trust)))


def _facts(written: Retokenization, destination: str) -> dict[str, Any]:
    header, shards = written.manifest.header, written.manifest.shards
    return {
        "path": destination,
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "shards": len(shards),
        "resumed_shards": written.resumed,
        "bytes": sum(shard.bytes for shard in shards),
        "codec": header.codec,
        "tokenizer": header.tokenizer,
        "retokenized": header.capture["retokenized"],
        "measured": None if written.figures is None else written.figures.to_dict(),
        "fidelity": header.fidelity,
    }


def _tell(written: Retokenization, destination: str) -> None:
    """Say what was written, and what became of the teacher's distributions."""
    header, shards = written.manifest.header, written.manifest.shards
    documents, tokens, rows, size = (
        sum(getattr(shard, name) for shard in shards) for name in ("documents", "tokens", "rows", "bytes")
    )
    content = f"{number_of(documents, 'document')}, {number_of(tokens, 'token')}"
    again = f", {written.resumed} of them already there" if written.resumed else ""
    say(f"{content} in {number_of(len(shards), 'shard')}{again}: {destination}")
    if written.figures is None:
        say("the tokenizers are the same: every document is copied, byte for byte")
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    _, facts = written.figures.facts()
    if header.fidelity is not None:
        stats = FidelityStats.from_dict(header.fidelity)
        facts.append(("size", f"{human_bytes(size)}, {size / max(rows, 1):,.1f} bytes per distribution"))
        facts.append(("codec", f"KL {stats.kl_mean:.2e} on average, {stats.kl_p99:.2e} at p99, by storing them"))
    for label, value in facts:
        table.add_row(Text(label, style="dim"), Text(value))
    show(table)
