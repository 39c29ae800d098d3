"""A page (HTML) on a dataset: its size, fidelity and alignment. Figures are those of `Inspection.to_dict`; keys that
this page does not know are shown as they are."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distillkit.console import human_bytes
from distillkit.reports.charts import chart
from distillkit.reports.html import Html, Section, element, joined, page, paragraph, table
from distillkit.reports.inspection import Inspection
from distillkit.reports.inspection_plots import inspection_panels

__all__ = ["inspection_page"]

# Sums of other entries of bytes_per_token.
_TOTALS = ("codec", "total")


def inspection_page(inspection: Inspection) -> str:
    """Compose a page on a dataset.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figures = _Figures(inspection.to_dict())
    figures["rate_by_entropy"]  # has a chart
    name = Path(inspection.path.rstrip("/")).name or inspection.path
    introduction = paragraph(figures["path"], class_="soft")
    sections = [
        Section("verdict", "Verdict", _verdict(figures), wide=False),
        Section("contents", "Contents", _contents(figures), wide=False),
        Section("size", "Bytes per token", _size(figures), wide=False),
        Section("fidelity", "Fidelity", _fidelity(figures), wide=False),
        Section("mass", "Stored probability" if inspection.draws is None else "Next token", _mass(figures), wide=False),
        Section("charts", "Charts", _charts(inspection)),
        Section("documents", "Worst documents", _documents(figures)),
        Section("codec", "Codec", _codec(figures), wide=False),
        Section("capture", "Capture", _facts("Capture", list(_flat(figures["capture"] or {}))), wide=False),
        Section("more", "More figures", _facts("More figures", list(_flat(figures.rest()))), wide=False),
    ]
    return page(name, introduction, sections)


class _Figures:
    """The figures, and which of them have been shown."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content
        self._shown: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._shown.add(key)
        return self._content.get(key)

    def rest(self) -> dict[str, Any]:
        """The figures that have not been shown."""
        return {key: value for key, value in self._content.items() if key not in self._shown}


def _verdict(figures: _Figures) -> Html:
    alignment, plausibility = figures["alignment"], figures["plausibility"]
    said, kind = {
        "ok": ("The rows line up with their tokens.", "good"),
        "undecided": (
            "Whether the rows line up with their tokens is undecided: too little data, or rows of another text.",
            "doubt",
        ),
        "shifted": ("The rows belong to other tokens: do not train on them.", "bad"),
    }[alignment["verdict"]]
    notes = [element("div", said, class_=f"note {kind}")]
    notes += [element("div", f"Impossible: {finding}", class_="note bad") for finding in plausibility["impossible"]]
    notes += [element("div", f"Doubtful: {finding}", class_="note doubt") for finding in plausibility["doubts"]]
    notes += [element("div", f"Warning: {each}", class_="note doubt") for each in figures["codec"]["warnings"]]
    rates = [(shift.replace("-", "−"), f"{rate:.2%}") for shift, rate in alignment["rates"].items()]
    caption = (
        "How often the true next token is the first stored id, with the rows shifted by … "
        f"({alignment['positions']:,} positions)"
    )
    return joined(notes, element("div", table(caption, ("shift", "rate"), rates), class_="numbers"))


def _contents(figures: _Figures) -> Html:
    figures["kind"]  # is said by the origin
    facts = [
        ("origin", figures["origin"]),
        ("documents", f"{figures['documents']:,}"),
        ("tokens", f"{figures['tokens']:,}"),
        (
            "distributions",
            f"{figures['rows']:,} ({figures['rows_per_document'].replace('-', ' − ')} for a document of L tokens)",
        ),
        ("files", f"{figures['files']:,} ({human_bytes(figures['file_bytes'])})"),
        ("read for this page", f"{figures['documents_read']:,} documents, {figures['rows_read']:,} distributions"),
        ("in the loss", f"{figures['counted']:,} of the distributions read"),
        ("vocabulary", f"{figures['vocab_size']:,} ids, logits {figures['head_size']:,} wide"),
        ("temperature", f"{figures['temperature']:g}"),
    ]
    ids = figures["ids_per_row"]
    if ids is not None:
        varying = f"{ids['mean']:,.1f} on average, 80% of them have {ids['p10']:,} to {ids['p90']:,}"
        fixed = ids["p10"] == ids["p90"] == ids["mean"]
        facts.insert(4, ("ids per distribution", f"{ids['p10']:,} each" if fixed else varying))
    for key in ("teacher", "tokenizer"):
        facts += [(key, "not recorded")] if figures[key] is None else list(_flat(figures[key], key))
    return _facts("Contents", facts)


def _size(figures: _Figures) -> Html:
    sizes, ratios = figures["bytes_per_token"], figures["compression"]
    total = sizes["total"]
    rows: list[tuple[Any, ...]] = []
    for part, size in sizes.items():
        if part not in _TOTALS:
            share = size / total if total else 0.0
            bar = element("span", class_="bar", style=f"width: {100 * share:.1f}%", aria_hidden="true")
            rows.append((part.replace("_", " "), f"{size:,.1f}", f"{share:.1%}", bar))
    rows.append((element("b", "total"), element("b", f"{total:,.1f}"), "", ""))
    header = ("part", "bytes", "share", element("span", "share as a bar", class_="unseen"))
    caption = "Bytes per stored distribution. Overhead is everything else in the files"
    others = {
        "dense_bf16": "Dense logits in bfloat16",
        "topk_bf16": "Plain top-k (4 bytes per id, 2 per value)",
        "published": "The published layout with as many ids",
    }
    compared = [paragraph(f"{others.get(key, key)}: {ratio:,.2f} times as large.") for key, ratio in ratios.items()]
    return joined(element("div", table(caption, header, rows), class_="numbers bars"), compared)


def _draws(draws: Mapping[str, Any], ids: Mapping[str, float] | None) -> Html:
    variance = draws["variance"]
    rows = [
        ("distinct ids, mean", "–" if ids is None else f"{ids['mean']:,.1f}"),
        ("effective ids (1 / Σ w², w the shares of the draws)", f"{draws['effective_ids']:,.1f}"),
        ("variance (Σ Var(w), estimated)", "–" if variance is None else f"{variance:.2e}"),
        ("its bound (1 / draws)", f"{draws['variance_bound']:.2e}"),
    ]
    caption = f"{draws['number']:,} draws per distribution at temperature {draws['temperature']:g}, stored as they are"
    return element("div", table(caption, (), rows), class_="numbers")


def _fidelity(figures: _Figures) -> Html:
    fidelity, draws = figures["fidelity"], figures["draws"]
    if draws is not None:
        return _draws(draws, figures["ids_per_row"])
    if not fidelity or not fidelity["rows"]:
        return paragraph(
            "Not recorded. Measure it with ", element("code", "distillkit-codec inspect --teacher MODEL"), "."
        )
    known = {
        "kl_mean": ("KL, mean", "{:.2e} nats"),
        "kl_p99": ("KL, 99th percentile", "{:.2e} nats"),
        "kl_max": ("KL, maximum", "{:.2e} nats"),
        "worst_error": ("largest error of a log-probability", "{:.3g} nats"),
        "top1_agreement": ("top-1 kept", "{:.2%}"),
        "mass_error": ("error of the stored mass, mean", "{:.1e}"),
    }
    rows = [(known[key][0], known[key][1].format(value)) for key, value in fidelity.items() if key in known]
    rows += [
        item for key, value in fidelity.items() if key not in (*known, "rows", "source") for item in _flat(value, key)
    ]
    caption = f"Decoded against the original, {fidelity['source']}, {fidelity['rows']:,} distributions"
    return element("div", table(caption, (), rows), class_="numbers")


def _mass(figures: _Figures) -> Html:
    mass, following = figures["mass"], figures["next_token"]
    if mass is None:
        return paragraph("Nothing is stored.")
    labels = {
        "mean": "mean",
        "p50": "median",
        "p1": "1st percentile",
        "impossible": "distributions of more than 1.1",
    }
    caption = "Total probability of the stored ids of a distribution"
    rows = [(labels.get(key, key), f"{value:.2%}") for key, value in mass.items()]
    if figures["draws"] is not None:
        # The shares of draws sum to 1.
        caption, rows = "How often the draws of a distribution have the true next token", []
    rows += [
        ("the true next token is the first stored id", f"{following['is_first']:.2%}"),
        ("the true next token is a stored id", f"{following['is_stored']:.2%}"),
    ]
    return element("div", table(caption, (), rows), class_="numbers")


def _charts(inspection: Inspection) -> Html:
    if not inspection.rows_read:
        return Html("")
    panels = inspection_panels(inspection)
    return element("div", [chart(panel, index) for index, panel in enumerate(panels)], class_="charts")


def _documents(figures: _Figures) -> Html:
    documents = figures["worst_documents"]
    if not documents or figures["draws"] is not None:
        return Html("")
    rows = [
        (f"{each['document']:,}", f"{each['mass']:.2%}", f"{each['is_first']:.1%}", f"{each['rows']:,}", each["doc_id"])
        for each in documents
    ]
    command = f"distillkit-codec show {shlex.quote(figures['path'])} --document {documents[0]['document']}"
    header = ("document", "stored mass, mean", "next token first", "distributions", "id")
    caption = "The documents of which the least probability is stored, of those that were read"
    look = paragraph("To look at the first: ", element("code", command))
    return joined(element("div", table(caption, header, rows), class_="numbers"), look)


def _codec(figures: _Figures) -> Html:
    return _facts("Codec", list(_flat({key: value for key, value in figures["codec"].items() if key != "warnings"})))


def _facts(caption: str, rows: Sequence[tuple[str, str]]) -> Html:
    return element("div", table(caption, (), rows, hidden=True), class_="facts") if rows else Html("")


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The entries of nested mappings, with their dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and not any(isinstance(each, (dict, list)) for each in value):
        yield name, ", ".join(_said(each) for each in value)
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{index}]")
    else:
        yield name, _said(value)


def _said(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
