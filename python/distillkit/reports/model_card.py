"""The model card of a trained student, from its run's record: what it learned, from whom, and how well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distillkit.configuration.cards import CARD, front_matter, hub_id, public_name
from distillkit.reports.run_record import HOW, RunRecord
from distillkit.reports.run_report import MARKDOWN, described, evaluation_rows, rollout_rows, table

__all__ = ["CARD", "CARD_MARK", "model_card"]

CARD_MARK = "<!-- written by distillkit; remove this line to keep the card as you edit it -->"
"""Tells our cards from those that users wrote, which are kept."""

_LEFT_OUT = ("machine", "began")
"""Facts that say nothing about the student."""


def model_card(run: RunRecord, name: str | None = None) -> str:
    """Compose the model card of a run's student in Markdown, with a YAML header.

    Names that are paths are shortened to their last part.

    Args:
        run: the run, with its description.
        name: hub id of the model, for the example; by default the name of its folder.
    """
    description = run.description
    student, teacher, data = (description[part] for part in ("student", "teacher", "data"))
    header = {
        "library_name": "peft" if student.get("adapters") else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": hub_id(student["path"]),
        "datasets": sorted({found for part in _datasets(data) if (found := hub_id(part["path"])) is not None}),
        "tags": ["distillkit", "knowledge-distillation"],
    }
    named = replace(run, description=_without_paths(description))
    facts = [row for row in described(named, MARKDOWN) if row[0] not in _LEFT_OUT]
    whose = MARKDOWN.name(_teacher_name(teacher)) if teacher["name"] else "a teacher that the data do not name"
    how = HOW[teacher["kind"]]
    sections = [
        front_matter(header),
        CARD_MARK,
        f"# {public_name(name or run.folder.resolve())}",
        f"{MARKDOWN.name(public_name(student['path']))}, trained by "
        f"[distillkit](https://pypi.org/project/distillkit/) on the {how} next-token distributions of "
        f"{whose}, for {run.step:,} steps.",
        "## Use",
        _use(str(student["class"]), name or run.folder.resolve().name),
        "## Training",
        table(("", ""), facts),
    ]
    if run.evaluations:
        sections += ["## On held-out documents", table(*evaluation_rows(run))]
    if run.rollouts:
        sections += ["## On its own completions", table(*rollout_rows(run))]
    return "\n\n".join(sections) + "\n"


def _without_paths(description: dict[str, Any]) -> dict[str, Any]:
    """Return a run's description whose names may be published."""
    return {
        **description,
        "student": {**description["student"], "path": public_name(description["student"]["path"])},
        "teacher": {
            **description["teacher"],
            "name": _teacher_name(description["teacher"]),
        },
        "data": {part: _published(data) for part, data in description["data"].items()},
    }


def _teacher_name(teacher: dict[str, Any]) -> str | None:
    """The name of the teacher, or of several, that may be published."""
    names = teacher.get("names") or ([teacher["name"]] if teacher["name"] else [])
    return ", ".join(map(public_name, names)) or None


def _datasets(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The descriptions of all datasets, also those of lists."""
    return [each for part in data.values() for each in part.get("sources", [part])]


def _published(data: dict[str, Any]) -> dict[str, Any]:
    if "sources" in data:
        return {**data, "sources": [_published(each) for each in data["sources"]]}
    return {**data, "path": public_name(data["path"])}


def _use(kind: str, name: str) -> str:
    loader = "AutoModelForCausalLM" if kind.endswith("ForCausalLM") else kind
    return (
        f"```python\nfrom transformers import {loader}, AutoTokenizer\n\n"
        f"model = {loader}.from_pretrained({name!r})\ntokenizer = AutoTokenizer.from_pretrained({name!r})\n```"
    )
