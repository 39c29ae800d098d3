"""`distillkit-codec show`: a document's text with the teacher's most probable tokens beside each token."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from distillkit.cli.common import CONFIG, JSON, SPLIT
from distillkit.console import number_of, output, progress_console, quiet_libraries, say, show
from distillkit.errors import ConfigError, MismatchError
from distillkit.reports.token_view import Candidate, TokenView, dataset_tokenizer, view_document
from distillkit.shards import Dataset

__all__ = ["show_document"]

_AT_FIRST = 64
"""Tokens that are shown unless others are asked for."""

# Characters of a cell of a token, with the space after it, and of the columns for probability and rank.
_NARROWEST, _WIDEST, _FIXED = 10, 24, 11

_VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}

# Styles of a token by the least probability that the teacher gave it.
_STYLES = ((0.5, "bold green"), (0.1, "green"), (0.01, "yellow"), (0.0, "red"))


def _range(context: click.Context, option: click.Parameter, value: str) -> slice:
    found = re.fullmatch(r"(\d*):(\d*)", value)
    if found is None:
        raise click.BadParameter(f"must be FIRST:END, such as 0:64, found {value!r}")
    return slice(*(int(part) if part else None for part in found.groups()))


@click.command("show", short_help="Show a document's text with the teacher's best tokens.")
@click.argument("path")
@click.option("--document", type=int, default=0, show_default=True, help="Its number, from 0; −1 is the last one.")
@click.option(
    "--tokens",
    callback=_range,
    default=f"0:{_AT_FIRST}",
    show_default=True,
    metavar="FIRST:END",
    help="Which of its tokens, numbered from 0, END excluded; `:` shows all.",
)
@click.option("--best", type=click.IntRange(1, 20), default=5, show_default=True, help="Teacher's tokens at each.")
@click.option(
    "--tokenizer", help="Its folder or hub id; by default the one that the dataset names. Without one, ids are shown."
)
@CONFIG
@SPLIT
@JSON
def show_document(
    path: str,
    document: int,
    tokens: slice,
    best: int,
    tokenizer: str | None,
    config: str | None,
    split: str | None,
    as_json: bool,
) -> None:
    """Show one document of the dataset at PATH token by token: the teacher's probability of each token, its rank among
    the stored ones, and the tokens that the teacher found most probable there.

    Of a dataset of draws (format sampled), probabilities are shares of the draws.

    Spaces are shown as ·, line ends as ⏎, and tokens that are only a part of a character as their bytes. Tokens that do
    not count in a loss are in brackets. Colours show how probable a token was; NO_COLOR turns them off.
    """
    dataset = Dataset.open(path, config=config, split=split)
    loaded = _tokenizer(dataset, tokenizer)
    views = view_document(dataset, document, loaded, best=best, tokens=tokens)
    stored = dataset[document]
    if as_json:
        content = {
            "path": dataset.path,
            "document": document % len(dataset),
            "doc_id": stored.doc_id,
            "length": len(stored.input_ids),
            "tokens": [view.to_dict() for view in views],
        }
        click.echo(json.dumps(content, ensure_ascii=False))
        return
    draws = dataset.codec.draws
    drawn = "" if draws is None else f": shares of {draws.number:,} draws from the teacher"
    show(_table(views, f"{dataset.path}, document {document % len(dataset)} of {len(dataset):,}{drawn}", best))
    length = len(stored.input_ids)
    if len(views) < length:
        say(f"{len(views):,} of its {number_of(length, 'token')}; --tokens : shows all of them")


def _tokenizer(dataset: Dataset, name: str | None) -> Any:
    """Return the dataset's tokenizer; None, with a message, if there is none and none was asked for."""
    try:
        quiet_libraries()
        return dataset_tokenizer(dataset, name)
    except (ConfigError, MismatchError, ModuleNotFoundError) as error:
        if name is not None:
            raise
        reason = str(error).partition("\n")[0]
        progress_console().print(
            Text(f"showing ids; for text, pass the teacher's folder as --tokenizer: {reason}"), highlight=False
        )
        return None


def _table(views: list[TokenView], title: str, best: int) -> Table:
    """Format the tokens: as many of the teacher's as fit into the terminal, each with some letters."""
    digits = len(str(max((view.position for view in views), default=0)))
    room = output().width - (digits + 1) - _FIXED
    best = max(1, min(best, room // _NARROWEST - 1))
    cell = max(_NARROWEST, min(room // (best + 1), _WIDEST)) - 1
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", justify="right", style="dim", min_width=digits, no_wrap=True)
    table.add_column("token", no_wrap=True)
    table.add_column("prob.", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("teacher", no_wrap=True)
    for _ in range(best - 1):
        table.add_column("", no_wrap=True)
    for view in views:
        rank = "" if not view.best else "–" if view.rank is None else f"{view.rank + 1:,}"
        candidates = (_candidate(each, view.id, cell) for each in view.best[:best])
        table.add_row(str(view.position), _token(view, cell), _percent(view.logprob), rank, *candidates)
    return table


def _token(view: TokenView, width: int) -> Text:
    text = _visible(view.text, view.id)
    style = "bold magenta" if view.special else _style(view)
    found = Text(text if view.counts else f"({text})", style if view.counts else "dim")
    found.truncate(width, overflow="ellipsis")
    return found


def _candidate(candidate: Candidate, token: int, width: int) -> Text:
    """Format one of the teacher's tokens; the document's own is underlined."""
    text = _visible(candidate.text, candidate.id)
    found = Text.assemble(
        (f"{_percent(candidate.logprob):>4} ", "dim"), (text, "underline" if candidate.id == token else "")
    )
    found.truncate(width, overflow="ellipsis")
    return found


def _visible(text: str | None, token: int) -> str:
    """Return a token's text with its spaces and line ends made visible, or its id."""
    if text is None:
        return f"#{token}"
    # Before a line feed is escaped by whoever prints it.
    return "".join(_VISIBLE.get(character, character) for character in text)


def _style(view: TokenView) -> str:
    """Return a token's style. One that is not stored is less probable than all that are."""
    if not view.best:
        return ""
    probability = 0.0 if view.logprob is None else math.exp(view.logprob)
    return next(style for least, style in _STYLES if probability >= least)


def _percent(logprob: float | None) -> str:
    """Format a probability in four characters."""
    if logprob is None:
        return ""
    share = 100 * math.exp(logprob)
    return f"{share:.0f}%" if share >= 9.95 else f"{share:.1f}%" if share >= 0.05 else "<.1%"
