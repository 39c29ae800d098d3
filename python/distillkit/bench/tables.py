"""The tables of fidelity and speed, for a terminal and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from distillkit.bench.fidelity import FidelityRow, Figures
from distillkit.bench.machine import machine
from distillkit.bench.sample import Sample

if TYPE_CHECKING:
    from distillkit.bench.speed import SpeedRow

__all__ = ["csv_rows", "fidelity_table", "short_number", "speed_table", "write_csv"]


def short_number(value: float | None, digits: int = 3) -> str:
    """Formats a number with few digits: 0, 0.5, 1.67e-4, 12.3, 4,100, 10.4 M."""
    if value is None:
        return "–"
    if value >= 999_500:
        return f"{value / 1e6:.{3 - len(str(int(value / 1e6)))}f} M" if value < 1e9 else f"{value / 1e6:,.0f} M"
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    if value >= 0.01 or value == 0:
        return f"{value:.0f}" if value >= 10**digits else f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _headed(title: str, about: str, table: Table, notes: Iterable[str]) -> Group:
    said = [Text(note, "yellow") for note in notes if note]
    return Group(Text(title, "bold"), Text(about, "dim"), "", table, *([""] if said else []), *said)


def _table(headings: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold", vertical="bottom")
    return table


# -- fidelity ----------------------------------------------------------------------------------------------------------

_FIDELITY_ABOUT = (
    "Decoded values of our encoder and of the published one (B: bytes per token) against the original top k; KL over "
    "K ∪ {R} (the stored ids, and all others as one outcome) and errors in nats. Rising: rows whose values are not in "
    "descending order. Limits of the layout without rounding: unweighted least squares, and the least possible KL, "
    "which sacrifices the far tail."
)


def fidelity_table(rows: Sequence[FidelityRow], sample: Sample) -> Group:
    """For each configuration: our encoder, the published one, and the limits of the layout."""
    headings = "", "KL\nmean", "\np99", "\nmax", "mass\nerror", "mass\n> 1", "top-1\nkept", "worst\nerror", "p >\n1e-6"
    table = _table((*headings, "ris-\ning"))
    for row in rows:
        if row.skipped:
            continue
        table.add_row(Text.assemble((row.config, "cyan"), f", {short_number(row.bytes_per_token)} B"))
        for label, found in (
            ("  ours", row.ours),
            ("  published", row.published),
            ("  least squares", row.least_squares),
            ("  least KL", row.optimum),
        ):
            if found is not None:
                table.add_row(label, *_cells(found))
    title = f"fidelity on {len(sample):,} {sample.about}"
    notes = [f"{row.config}: {note}" for row in rows for note in (row.note, _spread_note(row)) if note]
    near = ", ".join(f"{row.config} {row.over_optimum:.2f}" for row in rows if row.over_optimum is not None)
    if near:
        notes.append(f"our mean KL relative to the least possible: {near}")
    return _headed(title, _FIDELITY_ABOUT, table, [sample.caution, *notes])


def _spread_note(row: FidelityRow) -> str:
    spread = row.published_spread
    if spread is None:
        return ""
    note = (
        "float32 cannot resolve the terms that the published encoder fits, so its mean KL depends on the order of "
        f"additions: {short_number(spread.one_thread)} with 1 thread, {short_number(spread.all_threads)} with "
        f"{spread.threads}, {short_number(spread.least)} to {short_number(spread.most)} over {spread.orders} orders of "
        "the ranks"
    )
    if spread.normalized is None:
        return note
    return f"{note}; with normalize_t, it is {short_number(spread.normalized)}"


def _cells(found: Figures, digits: int = 2) -> tuple[str, ...]:
    return (
        short_number(found.kl_mean, digits),
        short_number(found.kl_p99, digits),
        short_number(found.kl_max, digits),
        short_number(found.mass_error, digits),
        _share(found.mass_above_one),
        _share(found.top1_agreement),
        short_number(found.worst_error, digits),
        short_number(found.worst_likely, digits),
        f"{found.increasing:.0%}",
    )


# -- speed -------------------------------------------------------------------------------------------------------------

_SPEED_ABOUT = (
    "Best of several runs, alternating between ours and a straightforward implementation of the published algorithm in "
    "batched torch. MB/s count the decoded ids and values (12 bytes for each of the k), or the logits. The limit is "
    "this machine's speed for as many bytes: copying them, or reading dense logits once."
)


def speed_table(rows: Sequence[SpeedRow]) -> Group:
    """One line per kind of work."""
    headings = "", "rows\nper call", "ours\ntokens/s", "published\ntokens/s", "\nratio", "bytes\nper token", "\nMB/s"
    table = _table((*headings, "of the\nlimit"))
    for row in rows:
        ratio = "–" if row.ratio is None else f"{short_number(row.ratio)}×"
        speeds = short_number(row.tokens_per_second), short_number(row.published)
        sizes = short_number(row.bytes_per_token), _megabytes(row), _share(row.of_limit)
        table.add_row(row.work, f"{row.rows:,}", *speeds, ratio, *sizes)
    notes = [f"{row.work}: {_memory_note(row)}" for row in rows if _memory_note(row)]
    for note in dict.fromkeys(row.note for row in rows if row.note):
        works = [row.work for row in rows if row.note == note]
        notes.append(f"{'; '.join(works)}: {note}")
    return _headed(f"speed on {machine()}", _SPEED_ABOUT, table, notes)


def _megabytes(row: SpeedRow) -> str:
    return f"{row.mb_per_second:,.0f}"


def _memory_note(row: SpeedRow) -> str:
    if row.extra_bytes is None or row.published_extra_bytes is None:
        return ""
    ours, published = row.extra_bytes / 1e6, row.published_extra_bytes / 1e6
    return f"peak memory beyond inputs and outputs: ours {ours:.1f} MB, published {published:.1f} MB"


# -- files -------------------------------------------------------------------------------------------------------------


_NESTED = "ours", "published", "least_squares", "optimum", "published_spread"


def csv_rows(rows: Sequence[FidelityRow] | Sequence[SpeedRow], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One CSV line per row: every value in its own column, followed by `about`."""
    return [{**_flat(row.to_dict()), **about} for row in rows]


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes lines as CSV, with the union of their columns."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}_{part}": _rounded(figure) for part, figure in value.items()}
        elif name not in _NESTED or value is not None:
            flat[name] = _rounded(value)
    return flat


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
