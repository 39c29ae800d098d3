"""`distillkit student`: make a student from a teacher."""

from __future__ import annotations

import json
import re

import click
from rich.table import Table

from distillkit.cli.common import JSON
from distillkit.configuration.overrides import parse_overrides
from distillkit.console import quiet_libraries, show

__all__ = ["student"]


def _layers(context: click.Context, option: click.Parameter, value: str | None) -> int | list[int] | None:
    if value is None or re.fullmatch(r"\s*\d+\s*", value):
        return None if value is None else int(value)
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"must be a number of layers (8) or a list of layers (0,9,19,29), found {value!r}")
    return [int(part) for part in parts]


@click.command(short_help="Make a student from a teacher's layers.")
@click.argument("teacher")
@click.argument("output")
@click.option(
    "--layers",
    callback=_layers,
    metavar="N | LIST",
    help="How many of the teacher's layers, evenly spread, with the first and the last among them; or a list of them, "
    "numbered from 0: 0,9,19,29.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of the teacher's config, such as intermediate_size=1024. Weights that then have another "
    "shape are new. May be repeated.",
)
@click.option("--from-scratch", is_flag=True, help="Make all weights new.")
@click.option("--seed", type=click.IntRange(min=0), default=42, show_default=True, help="Seed of new weights.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the teacher.")
@JSON
@click.pass_context
def student(
    context: click.Context,
    /,
    teacher: str,
    output: str,
    layers: int | list[int] | None,
    overrides: tuple[str, ...],
    from_scratch: bool,
    seed: int,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Make a student of the model TEACHER (a folder or hub id) and write it to the new folder OUTPUT.

    It has the teacher's vocabulary, tokenizer, chat template and generation config, and those of the teacher's weights
    that fit: the embeddings, the head and the chosen layers. How to choose a student: docs/students.md

    \b
    Examples:
      distillkit student teacher/ student/ --layers 8
      distillkit student teacher/ small/ --layers 8 --set intermediate_size=1024
      distillkit student teacher/ new/ --layers 8 --from-scratch
    """
    if layers is None and not overrides and not from_scratch:
        raise click.UsageError("this would copy the teacher: give --layers, --set or --from-scratch", ctx=context)
    sizes = parse_overrides(overrides)
    quiet_libraries()
    from distillkit.training.make_student import make_student

    made = make_student(
        teacher,
        output,
        layers,
        sizes=sizes,
        from_scratch=from_scratch,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        click.echo(json.dumps(made.to_dict(), indent=2))
        return
    table = Table(title=f"student: {made.output}", show_header=False, title_justify="left")
    numbers = ", ".join(map(str, made.layers))
    table.add_row("layers", f"{len(made.layers)} of {made.teacher_layers}: the teacher's {numbers}")
    share = f"{made.parameters / made.teacher_parameters:.0%} of the teacher's {made.teacher_parameters:,}"
    table.add_row("parameters", f"{made.parameters:,} ({share}), {made.dtype}")
    table.add_row("from the teacher", f"{made.copied:,}")
    table.add_row("new, random", f"{made.parameters - made.copied:,}")
    table.add_row("vocabulary", f"{made.vocab_size:,} ids, with the teacher's tokenizer")
    show(table)
