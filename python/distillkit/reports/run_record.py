"""Reads the files that a training run writes for reports: metrics and a summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from distillkit.console import figure
from distillkit.errors import CorruptDataError, InputError

__all__ = [
    "DIFFERENCES",
    "HOW",
    "MEASURES",
    "METRICS",
    "OWN_WORDS",
    "REPORT",
    "SUMMARY",
    "Measure",
    "RunRecord",
    "read_metrics",
    "read_run",
    "record_of",
]

METRICS, SUMMARY, REPORT = "metrics.jsonl", "summary.json", "report.md"
DIFFERENCES = "_differences.json"
"""Has texts of the held-out documents. transformers leaves files with such a name out of what it pushes to the hub."""


@dataclass(frozen=True)
class Measure:
    """A metric on held-out documents.

    Attributes:
        name: its key in an evaluation's log entry.
        label: name for display.
        form: format string for values.
        share: whether it is a fraction between 0 and 1, whose change is reported in percentage points.
    """

    name: str
    label: str
    form: str
    share: bool = False

    def text(self, value: float) -> str:
        """Format a value: shares below 1% with more decimals, and huge numbers by their power of ten."""
        if self.share and 0 < value < 0.01:
            return f"{100 * value:.2g}%"
        return figure(value, self.form)

    def change(self, before: float, after: float) -> str:
        """Format the difference of two values."""
        if self.share:
            points = 100 * (after - before)
            return f"{points:+.1f} points" if abs(points) >= 0.05 or not points else f"{points:+.2g} points"
        return f"{after / before - 1:+.1%}" if before else ""


MEASURES = (
    Measure("eval_kl", "KL(teacher ‖ student), nats", "{:.4f}"),
    Measure("eval_kl_with_rest", "the same, with all other tokens as one outcome", "{:.4f}"),
    Measure("eval_cross_entropy", "cross-entropy, nats", "{:.4f}"),
    Measure("eval_perplexity", "perplexity", "{:,.2f}"),
    Measure("eval_top1_agreement", "top-1 agreement with the teacher", "{:.1%}", share=True),
    Measure("eval_topk_overlap", "overlap of the teacher's and the student's top tokens", "{:.1%}", share=True),
    Measure("eval_student_mass", "student's probability of the teacher's top tokens", "{:.1%}", share=True),
    Measure("eval_teacher_mass", "teacher's probability of its top tokens", "{:.1%}", share=True),
)

OWN_WORDS = (
    Measure("rollout_length", "length, tokens", "{:,.0f}"),
    Measure("rollout_ended", "ended by the student", "{:.1%}", share=True),
    Measure("rollout_repeated", "sequences of four tokens that repeat earlier ones", "{:.1%}", share=True),
    Measure("rollout_kl", "KL(student ‖ teacher) before training on them, nats", "{:.4f}"),
    Measure("rollout_kl_after", "KL(student ‖ teacher) after that, nats", "{:.4f}"),
)
"""What is measured on the student's own completions."""

HOW = {"dataset": "stored", "hf": "live", "server": "served", "hf and server": "live and served"}
"""How a teacher's distributions came to training, by its kind."""

# Keys of a training log entry that are not losses, for runs whose description does not list their losses.
_NO_LOSSES = (
    *("step", "loss", "epoch", "grad_norm", "learning_rate", "tokens_per_second", "data_wait", "peak_memory_gb"),
    *("teacher_wait", "scoring_tokens_per_second"),
    *("teacher_mass", "student_mass", "top1_agreement", "topk_overlap"),
)


@dataclass(frozen=True)
class RunRecord:
    """The record of a run.

    Attributes:
        folder: the run's output folder.
        description: what was trained, as returned by `describe`; empty if the run did not record it.
        training, evaluations: log entries in order, each with its `step`.
        summary: the summary of a finished run; otherwise None.
        differences: where student and teacher differ most, as of the last evaluation; None if there was none.
        rollouts: log entries of the rounds of completions by the student, at their beginning and at their end.
    """

    folder: Path
    description: dict[str, Any]
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any] | None
    differences: dict[str, Any] | None = None
    rollouts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last logged step."""
        return max([entry["step"] for entry in (*self.training, *self.evaluations)], default=0)

    @cached_property
    def parts(self) -> dict[str, float | None]:
        """The losses by name, with their fraction of the total weight (None if unknown)."""
        if "losses" in self.description:
            return {loss["name"]: loss["weight"] for loss in self.description["losses"]}
        return {name: None for entry in self.training[:1] for name in entry if name not in _NO_LOSSES}

    def sources(self, *, held_out: bool) -> list[dict[str, Any]]:
        """The datasets that are evaluated or trained on, if they are a list."""
        data = self.description.get("data", {}).get("eval" if held_out else "train", {})
        return list(data.get("sources", ()))

    def series(self, name: str, *, held_out: bool = False) -> tuple[list[int], list[float]]:
        """Return the steps and values of a metric, skipping values that are not finite."""
        own = any(name == measure.name for measure in OWN_WORDS)
        entries = self.rollouts if own else self.evaluations if held_out else self.training
        found = [(e["step"], float(e[name])) for e in entries if isinstance(e.get(name), (int, float))]
        finite = [(step, value) for step, value in found if abs(value) < float("inf")]
        return [step for step, _ in finite], [value for _, value in finite]

    @property
    def all_ids(self) -> bool:
        """Whether the teacher gave the probabilities of all tokens, so that those of its top tokens add up to 1."""
        masses = [
            entry.get("eval_teacher_mass", entry.get("teacher_mass")) for entry in (*self.training, *self.evaluations)
        ]
        return bool(masses) and all(mass == 1.0 for mass in masses)

    @property
    def tokens_per_second(self) -> float | None:
        """Throughput over the entire run; for an unfinished run, the mean of the logged values."""
        return self._overall("tokens_per_second")

    @property
    def data_wait(self) -> float | None:
        """The fraction of time spent waiting for data; computed like `tokens_per_second`."""
        return self._overall("data_wait")

    @property
    def teacher_wait(self) -> float | None:
        """The fraction of time spent waiting for a served teacher; None with other teachers."""
        return self._overall("teacher_wait")

    @property
    def peak_memory(self) -> float | None:
        """Peak memory in bytes: GPU memory if a GPU was used, otherwise resident memory."""
        if self.summary is not None:
            return float(self.summary["peak_cuda_bytes"] or self.summary["peak_rss_bytes"])
        _, values = self.series("peak_memory_gb")
        return max(values) * 1e9 if values else None

    def figures(self) -> dict[str, Any]:
        """Return results and costs: the last step, first and last evaluation, throughput, waiting, peak memory."""
        return {
            "step": self.step,
            "eval_first": self.evaluations[0] if self.evaluations else None,
            "eval_last": self.evaluations[-1] if self.evaluations else None,
            "tokens_per_second": self.tokens_per_second,
            "data_wait": self.data_wait,
            **({} if self.teacher_wait is None else {"teacher_wait": self.teacher_wait}),
            "peak_memory_bytes": self.peak_memory,
        }

    def _overall(self, name: str) -> float | None:
        if self.summary is not None and name in self.summary:
            return float(self.summary[name])
        _, values = self.series(name)
        return sum(values) / len(values) if values else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a file of metrics. An incomplete last line, as a killed process leaves it, is ignored.

    Raises:
        CorruptDataError: any other line is not a log entry.
        OSError: the file cannot be read.
    """
    lines = path.read_bytes().splitlines()
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise CorruptDataError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise CorruptDataError(f"{path}: line {number} is not a log entry: expected an object with a step")
        entries.append(entry)
    return entries


def read_run(folder: str | Path) -> RunRecord:
    """Read a run's record from its output folder.

    Raises:
        InputError: the folder contains no metrics.
        CorruptDataError: its files cannot be parsed.
    """
    folder = Path(folder)
    if not (folder / METRICS).is_file():
        raise InputError(f"{folder}: contains no {METRICS}; pass the output_path of a run of `distillkit CONFIG.yaml`")
    entries = read_metrics(folder / METRICS)
    return replace(
        record_of(folder, entries, _read_object(folder / SUMMARY)), differences=_read_object(folder / DIFFERENCES)
    )


def record_of(folder: Path, entries: Sequence[dict[str, Any]], summary: dict[str, Any] | None = None) -> RunRecord:
    """Make a run's record from its log entries; see `RunRecord`."""
    descriptions = [entry["run"] for entry in entries if "run" in entry]
    return RunRecord(
        folder=folder,
        description=descriptions[-1] if descriptions else {},
        training=[entry for entry in entries if "loss" in entry],
        evaluations=[entry for entry in entries if "eval_loss" in entry],
        summary=summary,
        rollouts=[entry for entry in entries if any(measure.name in entry for measure in OWN_WORDS)],
    )


def _read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON file that contains an object; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptDataError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptDataError(f"{path}: expected an object, found {type(content).__name__}")
    return content
