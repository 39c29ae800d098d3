"""`distillkit-codec inspect`: the size, fidelity and alignment of a dataset."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from distillkit.cli.common import CONFIG, HTML, JSON, LARGEST, SPLIT, check_writable
from distillkit.console import human_bytes, number_of, progress_bar, quiet_libraries, say, show
from distillkit.reports.inspection import DrawnRows, Inspection, inspect_dataset, recompute_fidelity
from distillkit.shards import Dataset
from distillkit.shards.alignment import SHIFTS

__all__ = ["inspect"]


@click.command(short_help="Show a dataset's size, fidelity and alignment.")
@click.argument("path")
@CONFIG
@SPLIT
@click.option(
    "--sample", type=click.IntRange(1, LARGEST), help="Read this many documents, evenly spread, instead of all."
)
@click.option("--teacher", help="Recompute fidelity with this model (folder or hub id), on --sample documents or 16.")
@click.option("--plot", type=click.Path(path_type=Path), help="Plot the distribution, the mass and the sizes (PNG).")
@HTML
@JSON
def inspect(
    path: str,
    config: str | None,
    split: str | None,
    sample: int | None,
    teacher: str | None,
    plot: Path | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Show the size and the fidelity of the dataset at PATH, and whether every row lines up with its token.

    PATH is a captured dataset, one of its shards, or a published dataset; a folder, a file or an fsspec URL.

    Bytes per token are the ids and values of a stored distribution and, as overhead, everything else in the files
    (token ids, checksums, the container). They are compared with dense bfloat16 logits (2 bytes per vocabulary entry),
    with plain top-k (4 bytes per id, 2 per value) and with the published layout. In the formats compact and sampled,
    the head of each row, the framing of each document and the prior are counted, too.

    The alignment check counts how often the true next token is the first stored id, with the rows as they are and
    shifted by one. The rate must peak at 0; otherwise the rows belong to other tokens, and the exit status is 1. It is
    also 1 if the rows cannot have been written by the dataset's codec: their probabilities add up to more than 1, for
    example. What is possible, but unlike real distributions, is shown as doubtful.
    """
    for file, ending, option in ((plot, ".png", "--plot"), (page, ".html", "--html")):
        if file is not None:
            check_writable(file, ending, option)
    dataset = Dataset.open(path, config=config, split=split)
    with progress_bar("reading documents") as progress:
        inspection = inspect_dataset(dataset, sample=sample, progress=progress)
    if teacher is not None:
        quiet_libraries()
        with progress_bar("running the teacher") as progress:
            stats = recompute_fidelity(dataset, teacher, sample=sample or 16, progress=progress)
        source = f"recomputed with {teacher}"
        inspection = replace(inspection, fidelity=stats, fidelity_source=source)
    if plot is not None:
        from distillkit.reports.inspection_plots import plot_inspection

        plot_inspection(inspection, plot)
    if page is not None:
        from distillkit.reports.html import write_page
        from distillkit.reports.inspection_page import inspection_page

        write_page(page, inspection_page(inspection))
    if as_json:
        click.echo(json.dumps(inspection.to_dict(), indent=2, allow_nan=False))
    else:
        sections = (_what, _size, _content, _alignment, _fidelity)
        show(Group(*(section(inspection) for section in sections)))
        if plot is not None:
            say(f"plot: {plot}")
        if page is not None:
            say(f"page: {page}")
    inspection.check()


class _Section:
    """Rows of label, value and note under a title, with the same columns in all sections."""

    def __init__(self, title: str, about: str = "") -> None:
        self._title = Text.assemble((title, "bold"), ("  " + about if about else "", "dim"))
        self._table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        self._table.add_column(style="cyan", min_width=20, no_wrap=True)
        self._table.add_column(min_width=9, justify="right", no_wrap=True)
        self._table.add_column(style="dim", overflow="fold")

    def add(self, label: str, value: str | Text, note: str = "") -> None:
        self._table.add_row(Text("  " + label), value, Text(note))

    def __rich__(self) -> Group:
        return Group("", self._title, self._table)


def _what(inspection: Inspection) -> Group:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", min_width=20, no_wrap=True)
    table.add_column(overflow="fold")
    config = ", ".join(f"{key} {json.dumps(value)}" for key, value in inspection.codec["config"].items())
    rows = f"{inspection.rows:,} ({inspection.rows_per_document.replace('-', ' − ')} for a document of L tokens)"
    named = f", preset {inspection.preset}" if inspection.preset else ""
    facts = [
        ("origin", inspection.origin),
        ("documents", f"{inspection.documents:,} of {number_of(inspection.tokens, 'token')} in all"),
        ("distributions", rows),
        ("files", f"{inspection.files:,} ({human_bytes(inspection.file_bytes)})"),
        ("teacher", _named(inspection.teacher, "dtype", "revision")),
        ("tokenizer", _named(inspection.tokenizer, "fingerprint")),
        ("vocabulary", f"{inspection.vocab_size:,} ids, logits {inspection.head_size:,} wide"),
        ("codec", f"{inspection.codec['format']} version {inspection.codec['version']}{named}"),
        ("", config),
        *(("", f"warning: {warning}") for warning in inspection.codec_warnings),
    ]
    if inspection.temperature != 1:
        facts.insert(6, ("temperature", f"{inspection.temperature:g}"))
    if inspection.documents_read < inspection.documents:
        sample = (
            f"{number_of(inspection.documents_read, 'document')}, evenly spread; content and alignment are of these"
        )
        facts.insert(4, ("sample", sample))
    for label, value in facts:
        table.add_row(Text("  " + label), Text(value))
    return Group(Text(inspection.path, "bold", overflow="fold"), table)


def _named(facts: dict[str, Any] | None, *details: str) -> str:
    if facts is None:
        return "not recorded"
    known = ", ".join(str(facts[detail]) for detail in details if facts.get(detail))
    return f"{facts.get('name')}" + (f" ({known})" if known else "")


_PART_NOTES = {
    "head": ", what each row begins with: its cluster and what says how it goes on",
    "framing": ", what each document takes besides its rows",
    "prior": ", prior.bin divided by all rows",
    "overhead": ", everything else in the files",
}


def _size(inspection: Inspection) -> _Section:
    section = _Section("size", "bytes per token")
    total = inspection.total_bytes
    k = inspection.k if inspection.draws is None else round(inspection.ids_mean) if inspection.rows_read else 0
    parts = {**inspection.part_bytes, "overhead": inspection.overhead_bytes}
    for label, size in parts.items():
        section.add(label, f"{size:,.1f}", f"{size / total:.1%}{_PART_NOTES.get(label, '')}" if total else "")
    section.add("total", Text(f"{total:,.1f}", "bold"))
    section.add(
        "plain top-k bf16", f"{6 * k:,.1f}", f"{inspection.topk_ratio:,.2f}× as much: {k} × (4 per id, 2 per value)"
    )
    dense = f"{inspection.dense_ratio:,.0f}× as much: {inspection.head_size:,} × 2"
    section.add("dense bf16", f"{2 * inspection.head_size:,.1f}", dense)
    published = inspection.published_ratio
    section.add("published layout", f"{published * total:,.1f}", f"{published:,.2f}× as much, with as many ids")
    _add_rates(section, inspection)
    return section


def _add_rates(section: _Section, inspection: Inspection) -> None:
    """How many ids rows have and, where rows differ in size, how that depends on their entropy."""
    if inspection.rows_read and inspection.ids_per_row[-1] < inspection.rows_read:
        quantiles = ", ".join(f"{share:.0%} have at most {inspection.ids_quantile(share)}" for share in (0.1, 0.5, 0.9))
        section.add(
            "ids per row", f"{inspection.ids_mean:,.1f}", f"of at most {len(inspection.ids_per_row) - 1}; {quantiles}"
        )
    if len(inspection.rate_by_entropy) > 1:
        pairs = ", ".join(f"{size:,.0f} at {entropy:.1f}" for entropy, size in inspection.rate_by_entropy)
        section.add("by entropy", "", f"bytes of rows at an entropy in nats: {pairs}")


def _content(inspection: Inspection) -> _Section:
    section = _Section("content", "probability of the stored ids, and rank of the true next token")
    if not inspection.rows_read:
        section.add("nothing stored", "")
        return section
    # Decoded with the wrong codec, it can have any magnitude.
    mean = f"{inspection.mass_mean:.2%}" if inspection.mass_mean < 10 else f"{inspection.mass_mean:.1e}"
    if inspection.draws is None:
        section.add("mass, mean", mean)
        section.add("mass, median", f"{inspection.mass_p50:.2%}")
        section.add("mass, p1", f"{inspection.mass_p1:.2%}", "1% of the positions have less")
    for label, style, findings in (
        ("IMPOSSIBLE", "bold white on red", inspection.impossible),
        ("doubtful", "yellow", inspection.doubts),
    ):
        for finding in findings:
            section.add(label, Text("!", style), finding)
    counted = f"of the positions read count in a loss: {inspection.counted:,}"
    section.add("in the loss", f"{inspection.counted / inspection.rows_read:.1%}", counted)
    section.add("next token first", f"{inspection.first_rate:.1%}", "it is the most probable stored id")
    section.add("next token stored", f"{inspection.stored_rate:.1%}", "it is any of the stored ids")
    return section


def _alignment(inspection: Inspection) -> _Section:
    section = _Section("alignment", "the true next token is the first stored id, with the rows shifted by")
    shifts = inspection.shifts
    for shift in SHIFTS:
        note = f"of {shifts.positions:,} positions" if shift == 0 else ""
        section.add(f"{shift:+d}".replace("-", "−") if shift else " 0", f"{shifts.rate(shift):.1%}", note)
    verdict, style, note = {
        "ok": ("ok", "bold green", "the rows line up with their tokens"),
        "undecided": ("undecided", "yellow", "no shift stands out: too little data, or rows of another text"),
        "shifted": ("FAILED", "bold white on red", "THE ROWS BELONG TO OTHER TOKENS: do not train on them"),
    }[inspection.alignment]
    section.add("verdict", Text(verdict, style), note)
    return section


def _draws(inspection: Inspection, draws: DrawnRows) -> _Section:
    at = "" if draws.temperature == 1 else f" at temperature {draws.temperature:g}"
    section = _Section("draws", f"{draws.number} per distribution{at}, stored as they are")
    section.add("ids, mean", f"{inspection.ids_mean:,.1f}", "distinct ids among the draws of a row")
    section.add("effective ids", f"{draws.effective_ids:,.1f}", "1 / Σ w², w the shares of the draws")
    section.add("variance", f"{draws.variance:.2e}", "Σ Var(w), the expected squared error of a row, estimated")
    section.add("its bound", f"{draws.variance_bound:.2e}", "1 / draws; it averages out over rows")
    return section


def _fidelity(inspection: Inspection) -> _Section:
    if inspection.draws is not None:
        return _draws(inspection, inspection.draws)
    stats = inspection.fidelity
    if stats is None or not stats.rows:
        section = _Section("fidelity", "not recorded; measure it with --teacher MODEL")
        return section
    section = _Section(
        "fidelity", f"decoded against the original, {inspection.fidelity_source}, {number_of(stats.rows, 'row')}"
    )
    about = "nats, KL(original ‖ decoded) over K ∪ {R}: the stored ids and the rest"
    section.add("KL, mean", f"{stats.kl_mean:.2e}", about)
    section.add("KL, p99", f"{stats.kl_p99:.2e}")
    section.add("KL, max", f"{stats.kl_max:.2e}")
    section.add("worst error", f"{stats.worst_error:.3g}", "nats, of any stored id, however improbable")
    section.add("top-1 kept", f"{stats.top1_agreement:.2%}", "the most probable id stays the most probable")
    section.add("mass error", f"{stats.mass_error:.1e}", "mean difference of the total stored probability")
    return section
