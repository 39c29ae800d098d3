"""The commands of both programs, by name; their modules are imported when a command is used."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import click

from distillkit.errors import ConfigError, nearest

__all__ = ["CODEC", "DISTILLKIT", "Commands", "TrainsByDefault"]


class _Command(NamedTuple):
    """Where a command is defined, and its line in the program's help."""

    module: str
    name: str
    about: str


DISTILLKIT = {
    "train": _Command("train", "train", "Train a student (the default command)."),
    "student": _Command("student", "student", "Make a student from a teacher's layers."),
    "init": _Command("init", "init", "Write a commented configuration to begin with."),
    "forecast": _Command("forecast", "forecast", "Estimate what a capture will cost, and whether it fits."),
    "capture": _Command("capture", "capture", "Run a teacher over text and store its distributions."),
    "retokenize": _Command("retokenize", "retokenize", "Rewrite a capture for a student with another tokenizer."),
    "merge": _Command("merge", "merge", "Average the distributions of several captures."),
    "pack": _Command("pack", "pack", "Write a dataset's documents packed in full rows."),
    "push": _Command("push", "push", "Push a capture to the Hugging Face hub, with a card."),
    "report": _Command("report", "report", "Write a run's report, or compare several runs."),
    "schema": _Command("schema", "schema", "Print the JSON schema of a configuration file."),
}
CODEC = {
    "inspect": _Command("inspect", "inspect", "Show a dataset's size, fidelity and alignment."),
    "show": _Command("show", "show_document", "Show a document's text with the teacher's best tokens."),
    "verify": _Command("verify", "verify", "Check every hash, checksum and row of a dataset."),
    "convert": _Command("convert", "convert", "Convert a dataset to shards, without loss or to another codec."),
    "tune": _Command("tune", "tune", "Find the codec configuration for a number of bytes."),
    "bench": _Command("bench", "bench", "Measure the codec's fidelity and speed."),
}
_PROGRAMS = {"distillkit": DISTILLKIT, "distillkit-codec": CODEC}
# Former names, not listed in the help.
_ALIASES = {"plan": "forecast"}


class Commands(click.Group):
    """The group of a program's commands.

    Args:
        table: the commands.
    """

    def __init__(self, *arguments: Any, table: dict[str, _Command], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self.table.get(_ALIASES.get(cmd_name, cmd_name))
        if entry is None:
            return None
        command: click.Command = getattr(importlib.import_module(f"distillkit.cli.{entry.module}"), entry.name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.about) for name, entry in self.table.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise click.UsageError(f"No such command '{args[0]}'{self._instead(args[0])}", ctx=ctx)
        return super().resolve_command(ctx, args)

    def _instead(self, word: str) -> str:
        """Return a hint to append: the other program's command, or the closest name."""
        for program, table in _PROGRAMS.items():
            if word in table:
                return f"; did you mean '{program} {word}'?"
        own = nearest(word, [*self.table, *(_ALIASES if self.table is DISTILLKIT else ())])
        others = {name: f"{program} {name}" for program, table in _PROGRAMS.items() for name in table}
        close = nearest(word, others)
        return own or next((f"; did you mean '{full}'?" for name, full in others.items() if f"'{name}'" in close), "")


class TrainsByDefault(Commands):
    """A group whose first argument may also be a configuration: `distillkit config.yaml` trains."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = next((arg for arg in args if not arg.startswith("-")), None)
        if first is not None and first not in (*self.table, *_ALIASES):
            if _may_be_a_configuration(first):
                args = ["train", *args]
            elif len(args) == 1:
                raise ConfigError(f"{first}: no such configuration file or command{self._instead(first)}")
        return super().parse_args(ctx, args)


def _may_be_a_configuration(word: str) -> bool:
    path = Path(word)
    return os.sep in word or path.suffix.lower() in (".yaml", ".yml", ".json") or path.is_file()
