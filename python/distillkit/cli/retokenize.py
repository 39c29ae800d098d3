"""`distillkit retokenize`: a capture in the tokens of a student with another tokenizer."""

from __future__ import annotations

import json
import os

import click

from distillkit.cli.common import CONFIG, JSON, SPLIT, facts_table
from distillkit.cli.convert import output_codec, wanted_codec
from distillkit.console import progress_bar, quiet_libraries, show
from distillkit.retokenize import Settings
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
        click.echo(json.dumps(written.to_dict(), ensure_ascii=False))
    else:
        show(facts_table(written))


def _vocab_size(student: str, trust: bool) -> int:
    """The width of the student's logits."""
    from distillkit.retokenize.sources import head_size
    from distillkit.text.tokenizer import load_tokenizer, vocab_size

    return head_size(student, vocab_size(load_tokenizer(student, trust_remote_code=trust)))
