"""`distillkit-codec`: inspect, verify and convert captured datasets, and benchmark the codec."""

from __future__ import annotations

import click

from distillkit import __version__
from distillkit.cli.commands import CODEC, Commands
from distillkit.cli.common import run_cli

__all__ = ["cli", "main"]


@click.command(cls=Commands, table=CODEC, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distillkit-codec")
def cli() -> None:
    """Inspect, verify and convert captured distributions, and benchmark the codec."""


def main() -> None:
    """Run the command line."""
    run_cli(cli)
