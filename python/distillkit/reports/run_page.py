"""A page (HTML) on training runs: results, curves, and where student and teacher differ most."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from distillkit.errors import CorruptDataError
from distillkit.reports.charts import chart
from distillkit.reports.html import Html, Section, element, joined, page, paragraph, table, token
from distillkit.reports.panels import Panel
from distillkit.reports.run_plots import comparison_panels, quality_panels, speed_panels
from distillkit.reports.run_record import DIFFERENCES, RunRecord
from distillkit.reports.run_report import (
    PLAIN,
    advice,
    comparison,
    cost,
    described,
    evaluation_notes,
    evaluation_rows,
    names_of,
    opening,
    rollout_rows,
    source_rows,
    understanding,
)

__all__ = ["run_page"]

_SHOWN = 12
"""Positions that are shown at once; the others can be unfolded."""


def run_page(runs: Sequence[RunRecord]) -> str:
    """Compose a page on one run, or on several side by side.

    Args:
        runs: the runs, at least one.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        CorruptDataError: a run's files are not as this release writes them.
    """
    names = names_of(runs)
    if len(runs) == 1:
        title, sections = names[0], _single(runs[0])
        introduction = paragraph(_opening(runs[0]), class_="soft")
    else:
        title, sections = f"{len(runs)} runs", _several(runs, names)
        introduction = joined(
            paragraph(element("b", name), ": ", _opening(run)) for run, name in zip(runs, names, strict=True)
        )
    return page(title, introduction, [*sections, *_configurations(runs, names)])


def _opening(run: RunRecord) -> str:
    with understanding(run):
        return opening(run, PLAIN)


def _single(run: RunRecord) -> list[Section]:
    results = Html("")
    if run.evaluations:
        with understanding(run):
            header, rows = evaluation_rows(run)
        results = joined(
            element("div", table("First and last evaluation", header, rows, hidden=True), class_="numbers"),
            [_note(note) for note in evaluation_notes(run)],
        )
    for held_out in (True, False):
        with understanding(run):
            header, rows = source_rows(run, held_out=held_out)
        if rows:
            heading = table("Held-out datasets" if held_out else "Training datasets", header, rows)
            results = joined(results, element("div", heading, class_="numbers"))
    own = Html("")
    if run.rollouts:
        with understanding(run):
            header, rows = rollout_rows(run)
        own = element("div", table("First and last round", header, rows, hidden=True), class_="numbers")
    quality, speed = _panels(run)
    positions, documents = _differences(run)
    return [
        Section("results", "On held-out documents", results),
        Section("completions", "On the student's own completions", own),
        Section("curves", "Losses and agreement", _charts(quality, 0)),
        Section("speed", "Speed and learning rate", _charts(speed, len(quality))),
        Section("differences", "Where student and teacher differ most", positions),
        Section("documents", "Worst documents", documents),
    ]


def _several(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Section]:
    rows = [(label, *values) for label, values in comparison(runs)]
    panels = comparison_panels(runs, names)
    sections = [
        Section(
            "results",
            "Side by side",
            element("div", table("Side by side", ("", *names), rows, hidden=True), class_="side"),
        ),
        Section("curves", "Curves", _charts(panels, 0)),
    ]
    count = len(panels)
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        own = [panel for group in _panels(run) for panel in group]
        positions, documents = _differences(run)
        parts = (
            ("All curves", _charts(own, count)),
            ("Where student and teacher differ most", positions),
            ("Worst documents", documents),
        )
        folded = [
            element("details", element("summary", heading), content, class_="part")
            for heading, content in parts
            if content
        ]
        notes = [_note(note) for note in evaluation_notes(run)]
        sections.append(Section(f"run-{number}", name, joined(notes, folded)))
        count += len(own)
    return sections


def _panels(run: RunRecord) -> tuple[list[Panel], list[Panel]]:
    with understanding(run):
        return quality_panels(run), speed_panels(run)


def _charts(panels: Sequence[Panel], first: int) -> Html:
    if not panels:
        return Html("")
    return element("div", [chart(panel, first + index) for index, panel in enumerate(panels)], class_="charts")


def _note(note: str, whose: str = "") -> Html:
    """Show a sentence, in which what is between backticks is code."""
    return paragraph(
        whose, (element("code", part) if index % 2 else part for index, part in enumerate(note.split("`")))
    )


# -- where student and teacher differ ----------------------------------------------------------------------------------


def _differences(run: RunRecord) -> tuple[Html, Html]:
    """The positions and the documents at which they differ most."""
    if run.differences is None:
        return Html(""), Html("")
    try:
        names = [source["name"] for source in run.sources(held_out=True)]
        documents = _documents(run.differences["documents"], _captured(run), names)
        return _positions(run.differences, names), documents
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptDataError(
            f"{run.folder / DIFFERENCES}: not the differences as this release writes them: {error!r}"
        ) from error


def _captured(run: RunRecord) -> str | None:
    """The path of the dataset of the worst held-out document, if it has the teacher's distributions."""
    if run.description.get("teacher", {}).get("kind") != "dataset" or "eval" not in run.description["data"]:
        return None
    data, worst = run.description["data"]["eval"], (run.differences or {})["documents"]
    sources = data.get("sources")
    return str(data["path"] if sources is None else sources[worst[0]["dataset"] if worst else 0]["path"])


def _positions(differences: dict[str, Any], names: Sequence[str]) -> Html:
    positions = [_position(each, names) for each in differences["positions"]]
    if not positions:
        return Html("")
    about = paragraph(
        f"The held-out positions with the largest KL(teacher ‖ student) at step {differences['step']:,}, at most three "
        "of a document: the text before, the true next token, and the most probable tokens of both. In brackets, the "
        "student's probability of the teacher's token.",
        class_="soft",
    )
    content = [about, element("ol", positions[:_SHOWN], class_="differences")]
    if len(positions) > _SHOWN:
        rest = element("ol", positions[_SHOWN:], class_="differences", start=_SHOWN + 1)
        content.append(element("details", element("summary", f"{len(positions) - _SHOWN} more"), rest))
    return joined(content)


def _documents(documents: list[dict[str, Any]], path: str | None, names: Sequence[str]) -> Html:
    """The documents, with the command that shows one if they are of the captured dataset at a path."""
    if not documents:
        return Html("")
    rows = [
        (
            _document(each, names),
            f"{each['kl']:.3f}",
            f"{each['top1_agreement']:.1%}",
            f"{each['positions']:,}",
            "" if each["text"] is None else each["text"],
        )
        for each in documents
    ]
    header = ("document", "KL, mean (nats)", "top-1 agreement", "positions", "beginning")
    caption = "The held-out documents with the largest mean KL(teacher ‖ student)"
    shown = element("div", table(caption, header, rows), class_="texts")
    if path is None:
        return shown
    command = f"distillkit-codec show {shlex.quote(path)} --document {documents[0]['document']}"
    look = paragraph("To see what the teacher expects in the first: ", element("code", command))
    return joined(shown, look)


def _document(each: dict[str, Any], names: Sequence[str]) -> str:
    """The number of a document, with the name of its dataset if there are several."""
    return f"{names[each['dataset']]} {each['document']:,}" if "dataset" in each else f"{each['document']:,}"


def _position(each: dict[str, Any], names: Sequence[str]) -> Html:
    heading = element("h3", f"KL {each['kl']:.2f} nats")
    place = paragraph(f"document {_document(each, names)}, position {each['position']:,}", class_="soft")
    before = "" if each["before"] is None else each["before"]
    text = paragraph(
        "…" if each["position"] >= 32 else "",
        before,
        " → ",
        token(each["next"]["text"], each["next"]["id"]),
        class_="text",
    )
    teacher = [
        (token(best["text"], best["id"]), f"{_share(best['p'])} ({_share(best['student_p'])})")
        for best in each["teacher"]
    ]
    student = [(token(best["text"], best["id"]), _share(best["p"])) for best in each["student"]]
    tables = element(
        "div",
        table("teacher (student)", (), teacher, narrow=True),
        table("student", (), student, narrow=True),
        class_="best",
    )
    return element("li", heading, place, text, tables)


def _share(p: float) -> str:
    return f"{p:.1%}" if p >= 0.0005 else "< 0.1%"


# -- configuration and cost --------------------------------------------------------------------------------------------


def _configurations(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Section]:
    facts, costs, notes = [], [], []
    for run, name in zip(runs, names, strict=True):
        with understanding(run):
            facts.append(dict(described(run, PLAIN)))
            costs.append(dict(cost(run)))
            notes += [_note(text, f"{name}: " if len(runs) > 1 else "") for text in advice(run, PLAIN)]
    header = ("", *names) if len(runs) > 1 else ()
    kind = "side" if len(runs) > 1 else "facts"
    sections = []
    for key, heading, found in (("configuration", "Configuration", facts), ("cost", "Cost", costs)):
        labels = list(dict.fromkeys(label for each in found for label in each))
        rows = [(label, *(each.get(label, "") for each in found)) for label in labels]
        content = element("div", table(heading, header, rows, hidden=True), class_=kind) if rows else Html("")
        sections.append(Section(key, heading, joined(content, notes if key == "cost" else ""), wide=len(runs) > 1))
    return sections
