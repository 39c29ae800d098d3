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
    distillkit config.yaml            train a student (the same as: distillkit train config.yaml)
    distillkit config.yaml --dry-run  check everything that training would need, without training
    distillkit forecast --model …     estimate what a capture will cost, and which codecs fit
    distillkit capture --model …      run a teacher over text once, and store its distributions
    distillkit pack DATA OUTPUT …     write its documents packed in full rows (training can also pack by itself)
    distillkit push DATA OWNER/NAME   push a capture to the Hugging Face hub, with a card
    distillkit report TRAINED         write a training run's report; compare several runs
    distillkit schema train           print the JSON schema of a configuration, for completion in editors
    distillkit-codec inspect DATA     show the size, fidelity and alignment of what was captured
    """


def main() -> None:
    """Run the command line."""
    run_cli(cli)
