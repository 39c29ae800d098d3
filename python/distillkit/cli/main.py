"""`distillkit`: train (the default command), forecast, capture, pack, report and schema.

The code of a command is only imported when it is used.
"""

from __future__ import annotations

import importlib

import click

from distillkit import __version__
from distillkit.cli.common import run_cli

__all__ = ["COMMANDS", "cli", "main"]

COMMANDS = {
    "train": ("distillkit.cli.train", "train"),
    "forecast": ("distillkit.cli.forecast", "forecast"),
    "capture": ("distillkit.cli.capture", "capture"),
    "pack": ("distillkit.cli.pack", "pack"),
    "report": ("distillkit.cli.report", "report"),
    "schema": ("distillkit.cli.schema", "schema"),
}
# Former names, not listed in the help.
ALIASES = {"plan": "forecast"}


class _TrainsByDefault(click.Group):
    """A group whose first argument may also be a configuration: `distillkit config.yaml` trains."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        cmd_name = ALIASES.get(cmd_name, cmd_name)
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = next((arg for arg in args if not arg.startswith("-")), None)
        if first is not None and first not in COMMANDS | ALIASES:
            args = ["train", *args]
        return super().parse_args(ctx, args)


@click.command(cls=_TrainsByDefault, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distillkit")
def cli() -> None:
    """Train small language models on the stored distributions of large ones.

    \b
    distillkit config.yaml            train a student (the same as: distillkit train config.yaml)
    distillkit config.yaml --dry-run  check everything that training would need, without training
    distillkit forecast --model …     estimate what a capture will cost, and which codecs fit
    distillkit capture --model …      run a teacher over text once, and store its distributions
    distillkit pack DATA OUTPUT …     write its documents packed in full rows (training can also pack by itself)
    distillkit report TRAINED         write a training run's report; compare several runs
    distillkit schema train           print the JSON schema of a configuration, for completion in editors
    distillkit-codec inspect DATA     show the size, fidelity and alignment of what was captured
    """


def main() -> None:
    """Run the command line."""
    run_cli(cli)
