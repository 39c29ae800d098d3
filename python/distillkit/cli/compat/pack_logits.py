"""`python -m distillkit.pack_logits`: `distillkit pack` with its published name and options."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from distillkit.cli.common import SPLIT
from distillkit.cli.pack import MAX_LEN, SHUFFLE_SEED, run_pack, table_of, window_option
from distillkit.console import show
from distillkit.shards.reader import Dataset

__all__ = ["main"]

logger = logging.getLogger("distillkit")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--dataset", required=True, help="A captured or published dataset: a folder, or a hub id.")
@SPLIT
@MAX_LEN
@click.option("--output", required=True, help="Folder for the packed dataset.")
@SHUFFLE_SEED
@window_option("--batch-size")
@click.option("--num-proc", type=click.IntRange(min=1), help="Accepted for compatibility; ignored.")
@click.option("--max-iters", type=click.IntRange(min=1), help="Accepted for compatibility; ignored.")
@click.option("--remove-columns", multiple=True, help="Accepted for compatibility; ignored.")
def main(
    dataset: str,
    split: str | None,
    max_len: int,
    output: str,
    shuffle_seed: int | None,
    batch_size: int,
    **not_needed: Any,
) -> None:
    """Write a dataset's documents packed in full rows; the same as `distillkit pack --overflow cut`."""
    for name, value in not_needed.items():
        if value:
            logger.info("--%s is accepted for compatibility and ignored", name.replace("_", "-"))
    source: Dataset
    if Path(dataset).exists() or dataset.startswith(("/", ".", "~")):
        source = Dataset.open(dataset, split=split)
    else:
        from distillkit.training.config.schema import DatasetSource, StoredTeacherConfig
        from distillkit.training.data.stored import open_dataset

        source = open_dataset(
            DatasetSource(repo_id=dataset, split=split), StoredTeacherConfig(kind="dataset"), "--dataset"
        )
    # The published command cuts longer documents without asking.
    show(table_of(run_pack(source, output, max_len, overflow="cut", seed=shuffle_seed, window=batch_size)))
