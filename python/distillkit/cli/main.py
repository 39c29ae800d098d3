"""`distillkit`: train (the default command), forecast, capture, pack, push, report and schema."""

from __future__ import annotations

import click

from distillkit import __version__
from distillkit.cli.commands import DISTILLKIT, TrainsByDefault
from distillkit.cli.common import run_cli

__all__ = ["cli", "main"]


@click.command(cls=TrainsByDefault, table=DISTILLKIT, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distillkit")
def cli() -> None:
    """Train small language models on the stored distributions of large ones.

    \b
    distillkit capture --model …      run a teacher over text, store its output
    distillkit-codec inspect DATA     look at what was captured (also: show)
    distillkit student TEACHER OUT …  make a student of some of its layers
    distillkit init train.yaml        write a configuration to begin with
    distillkit train.yaml --dry-run   check all that training will need
    distillkit train.yaml             train (short for: distillkit train …)
    """


def main() -> None:
    """Run the command line."""
    run_cli(cli)
