"""Writes reports on training runs from their `metrics.jsonl` and `summary.json`: `report.md` with plots for one run, or
a comparison of several. Nothing here imports torch."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from distillkit.console import figure, number_of
from distillkit.errors import CorruptDataError, printable
from distillkit.reports.run_record import MEASURES, METRICS, REPORT, SUMMARY, Measure, RunRecord, read_run

__all__ = ["ReportFiles", "comparison", "write_comparison", "write_report"]

logger = logging.getLogger(__name__)

_QUALITY, _SPEED = "report-quality.png", "report-speed.png"
_COMPARISON, _COMPARISON_PLOT = "comparison.md", "comparison.png"

# During training, the report is rewritten only after at least this many times as long as writing it took.
_PATIENCE = 50

# If at least this fraction of the time is spent waiting for data, the report gives advice.
_MUCH_WAITING = 0.1


# -- one run -----------------------------------------------------------------------------------------------------------


class ReportFiles:
    """The report of a run that is in progress or has just ended.

    Errors in writing it are logged as warnings and never end the run.

    Args:
        folder: the run's output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._next = 0.0

    def clear(self) -> None:
        """Remove the files of an earlier run, which would be mistaken for this one's."""
        for name in (SUMMARY, REPORT, _QUALITY, _SPEED):
            (self.folder / name).unlink(missing_ok=True)

    def update(self) -> None:
        """Write the report, unless it was written recently."""
        if time.monotonic() >= self._next:
            self.finish()

    def finish(self) -> None:
        """Write the report."""
        start = time.monotonic()
        try:
            write_report(read_run(self.folder))
        except Exception as error:  # noqa: BLE001 - a failed report must not end hours of training
            logger.warning(
                "the report in %s could not be written: %s; run `distillkit report` to try again", self.folder, error
            )
        end = time.monotonic()
        self._next = end + _PATIENCE * (end - start)


def write_report(run: RunRecord) -> list[Path]:
    """Write `report.md` and its plots into the run's folder.

    Returns:
        The files written. Without matplotlib there are no plots, and the report says so.

    Raises:
        OSError: a file cannot be written.
    """
    with _understanding(run):
        pictures = _draw(run)
        text = markdown(run, pictures)
    path = run.folder / REPORT
    path.write_text(text, encoding="utf-8")
    return [path, *(run.folder / name for name, _ in pictures or ())]


def _draw(run: RunRecord) -> list[tuple[str, str]] | None:
    """Draw the plots for which there is data. Returns (file name, title) of each, or None without matplotlib."""
    from distillkit.reports.run_plots import plot_quality, plot_speed

    pictures = []
    for name, title, plot, wanted in (
        (_QUALITY, "Losses and agreement with the teacher", plot_quality, run.training or run.evaluations),
        (_SPEED, "Speed, waiting for data, learning rate and gradients", plot_speed, run.training),
    ):
        if wanted:
            try:
                plot(run, run.folder / name)
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] != "matplotlib":
                    raise
                return None
            pictures.append((name, title))
    return pictures


def markdown(run: RunRecord, pictures: list[tuple[str, str]] | None) -> str:
    """Compose a run's report in Markdown.

    Args:
        run: the run.
        pictures: (file name, title) of its plots; None if matplotlib is not installed.
    """
    sections = [f"# {_text(run.name)}", _opening(run)]
    if run.evaluations:
        sections += ["## On held-out documents", _evaluations(run)]
    sections += [f"![{title}]({name})" for name, title in pictures or ()]
    if pictures is None:
        sections.append(
            "(No plots: matplotlib is not installed. Run `pip install 'distillkit[plot]'`, then `distillkit report`.)"
        )
    described = _described(run)
    if described:
        sections += ["## Configuration", _table(("", ""), described)]
    sections += ["## Cost", _table(("", ""), _cost(run)), *_advice(run)]
    sections += ["## Files", _files(run.folder)]
    return "\n\n".join(sections) + "\n"


def _opening(run: RunRecord) -> str:
    most = run.description.get("max_steps")
    steps = number_of(run.step, "step") if most is None else f"{run.step:,} of {number_of(most, 'step')}"
    state = "Finished" if run.summary is not None else "Not finished when this report was written"
    sentence = f"{state}: {steps}"
    student, teacher = run.description.get("student"), run.description.get("teacher")
    if student is not None and teacher is not None:
        how = "stored distributions" if teacher["kind"] == "dataset" else "live distributions"
        whose = f"{how} of {_text(teacher['name'])}" if teacher["name"] else f"{how} of an unnamed teacher"
        sentence += f", {_text(student['path'])} learning from {whose}"
    return sentence + "."


def _evaluations(run: RunRecord) -> str:
    first, last = run.evaluations[0], run.evaluations[-1]
    rows = []
    for measure in MEASURES:
        if measure.name in last:
            before, after = first.get(measure.name), last[measure.name]
            row = [measure.label, figure(after, measure.form)]
            if first["step"] != last["step"] and before is not None:
                row[1:1] = [figure(before, measure.form)]
                row.append(_change(measure, before, after))
            rows.append(row)
    header = ["", f"step {last['step']:,}"]
    if first["step"] != last["step"]:
        header[1:1] = [f"step {first['step']:,}"]
        header.append("change")
    text = _table(header, rows)
    steps, kl = run.series("eval_kl", held_out=True)
    if kl and min(kl) < kl[-1]:
        best = kl.index(min(kl))
        text += f"\n\nKL was lowest at step {steps[best]:,}: {kl[best]:.4f}."
    return text


def _change(measure: Measure, before: float, after: float) -> str:
    if measure.share:
        return f"{100 * (after - before):+.1f} points"
    return f"{after / before - 1:+.1%}" if before else ""


def _described(run: RunRecord) -> list[tuple[str, str]]:
    """Rows of the configuration table; empty if the run did not record a description."""
    if not run.description:
        return []
    return [(label, value) for label, value in _facts(run).items() if value]


def _facts(run: RunRecord) -> dict[str, str]:
    """The facts of a run's description, by label."""
    d = run.description
    if not d:
        return {}
    student, settings = d["student"], d["settings"]
    trained = "" if student["trained"] == student["parameters"] else f", {student['trained']:,} trained"
    adapters = " in LoRA adapters" if student.get("adapters") else ""
    batch = settings["batch"] * settings["accumulation"] * settings["processes"]
    cut = f"{settings['batch']} at a time × {settings['accumulation']} accumulated × processes: {settings['processes']}"
    facts = {
        "student": f"{_text(student['path'])}: {_fact(student['class'])}, {student['parameters']:,} "
        f"parameters{trained}{adapters}, {_fact(student['dtype'])}, {_fact(student['attention'])} attention",
        "teacher": _teacher(d["teacher"]),
        "losses": " + ".join(_loss(loss) for loss in d["losses"]),
        "set on the command line": ", ".join(
            f"{_fact(path)} = {_fact(json.dumps(value))}" for path, value in d.get("overrides", {}).items()
        ),
    }
    for key, label in (("train", "training data"), ("eval", "held-out data")):
        if key in d["data"]:
            facts[label] = _data(d["data"][key])
    return facts | {
        "steps": f"{d['max_steps']:,} (epochs begun: {d['epochs']:,})" if "max_steps" in d else "",
        "rows per step": f"{batch:,} ({cut}), {settings['sequence_length']:,} tokens at most",
        "optimiser": f"{_fact(settings['optimizer'])}, learning rate {settings['learning_rate']:g} "
        f"({_fact(settings['schedule'])}, "
        f"warm-up {settings['warmup_steps']:g}), weight decay {settings['weight_decay']:g}",
        "precision": f"{_fact(settings['precision'])}, "
        f"{'with' if settings['activation_checkpointing'] else 'without'} activation checkpointing",
        "machine": f"{_fact(settings['device'])}, data loader workers: {_fact(settings['workers'])}",
        "seed": _fact(settings["seed"]),
        "versions": _fact(", ".join(f"{name} {version}" for name, version in d["versions"].items())),
        "began": _fact(d["began"]),
    }


def _teacher(teacher: dict[str, Any]) -> str:
    name = _text(teacher["name"]) if teacher["name"] else "not recorded in the data"
    if teacher["kind"] == "dataset":
        return f"{name}, stored" + (f" top {teacher['k']:,}" if teacher["k"] else "")
    return f"{name}, live, " + (f"top {teacher['k']:,}" if teacher["k"] else "all ids")


def _loss(loss: dict[str, Any]) -> str:
    settings = [f"{_fact(key)} {_fact(value)}" for key, value in loss.items() if key not in ("name", "weight")]
    return f"{loss['weight']:.4g} {_fact(loss['name'])}" + (f" ({', '.join(settings)})" if settings else "")


def _data(data: dict[str, Any]) -> str:
    tokens = "" if data["tokens"] is None else f", {number_of(data['tokens'], 'token')}"
    rows = f", packed in {number_of(data['rows'], 'row')}" if data.get("rows") else ""
    return f"{_text(data['path'])}: {number_of(data['documents'], 'document')}{tokens}{rows}"


def _cost(run: RunRecord) -> list[tuple[str, str]]:
    from distillkit.console import human_bytes

    rows = [("steps", f"{run.step:,}")]
    if run.summary is not None:
        rows.append(("time", f"{run.summary['seconds']:,.1f} s, including loading and saving"))
        rows.append(("tokens", f"{run.summary['train_tokens']:,}"))
        if run.summary["cut_documents"]:
            documents, tokens = run.summary["cut_documents"], run.summary["cut_tokens"]
            cut = f"{number_of(documents, 'document')}, {number_of(tokens, 'token')}"
            rows.append(("truncated to the sequence length", cut))
    if run.tokens_per_second is not None:
        rows.append(("tokens per second", f"{run.tokens_per_second:,.0f}"))
    if run.data_wait is not None:
        rows.append(("time spent waiting for data", f"{run.data_wait:.1%}"))
    if run.peak_memory is not None:
        rows.append(("peak memory", human_bytes(run.peak_memory)))
    return rows


def _advice(run: RunRecord) -> list[str]:
    if run.data_wait is None or run.data_wait < _MUCH_WAITING:
        return []
    workers = run.description.get("settings", {}).get("workers")
    now = "" if workers is None else f" (now {_fact(workers)})"
    return [
        f"The device spent {run.data_wait:.0%} of the time waiting for data: raise "
        f"`training_args.dataloader_num_workers`{now}."
    ]


def _files(folder: Path) -> str:
    """Links to the files in the run's folder."""
    known = (
        (METRICS, "all log entries, one JSON object per line"),
        (SUMMARY, "final results"),
        ("distillkit_config.yaml", "the configuration"),
        ("config.json", "the student, with its weights and tokenizer in the same folder"),
    )
    lines = [f"- [{name}]({name}): {what}" for name, what in known if (folder / name).exists()]
    checkpoints = sorted(folder.glob("checkpoint-*/"), key=lambda path: (len(path.name), path.name))
    lines += [f"- [{_text(path.name)}]({quote(path.name)})" for path in checkpoints]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; if it has more than two columns, all but the first are right-aligned."""
    rule = ["---", *("---:" if len(header) > 2 else "---" for _ in header[1:])]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: object) -> str:
    """Quote a name, which may contain anything, so that Markdown does not interpret it: as code, on one line."""
    # In a cell of a table, a backslash before the bar could itself be escaped by one in the name.
    text = printable(str(value)).replace("\n", "\\n").replace("|", "\\x7c")
    if not text.strip():
        return "(no name)"
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{space}{text}{space}{fence}"


# Letters, digits and punctuation that mean nothing in Markdown.
_HARMLESS = re.compile(r"(?!.*(?:www\.|://))(?:[\w .,:+()%=-]|@\d)*")


def _fact(value: object) -> str:
    """Write a recorded fact: as it is if it cannot be taken for Markdown, otherwise as a name."""
    text = str(value)
    return text if _HARMLESS.fullmatch(text) else _text(text)


@contextmanager
def _understanding(run: RunRecord) -> Iterator[None]:
    """Turn what composing a report raises for a record of another form into an error that names the file.

    Raises:
        CorruptDataError: the record has other keys or values than this release writes.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptDataError(
            f"{run.folder / METRICS} or {run.folder / SUMMARY}: not the record of a run as this release writes it: "
            f"{error!r}"
        ) from error


# -- several runs ------------------------------------------------------------------------------------------------------


def comparison(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Compare several runs: differences in configuration, results, and cost.

    Returns:
        Rows of a label and one value per run.
    """
    from distillkit.console import human_bytes

    facts = []
    for run in runs:
        with _understanding(run):
            facts.append(_facts(run))
    labels = list(dict.fromkeys(label for fact in facts for label in fact if label not in ("began", "versions")))
    rows = []
    for label in labels:
        values = [fact.get(label, "") for fact in facts]
        if len(set(values)) > 1:
            rows.append((label, [value or "not recorded" for value in values]))
    rows.append(("steps", [f"{run.step:,}" + ("" if run.summary else " (not finished)") for run in runs]))
    for measure in MEASURES:
        ends = [_ends(run, measure) for run in runs]
        if any(ends):
            rows.append((measure.label, ends))
    for label, values in (
        ("tokens", ["" if run.summary is None else f"{run.summary['train_tokens']:,}" for run in runs]),
        ("tokens per second", [_written("{:,.0f}", run.tokens_per_second) for run in runs]),
        ("time spent waiting for data", [_written("{:.1%}", run.data_wait) for run in runs]),
        ("peak memory", ["" if run.peak_memory is None else human_bytes(run.peak_memory) for run in runs]),
    ):
        if any(values):
            rows.append((label, values))
    return rows


def _written(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _ends(run: RunRecord, measure: Measure) -> str:
    _, values = run.series(measure.name, held_out=True)
    if len(values) < 2:
        return figure(values[0], measure.form) if values else ""
    return f"{figure(values[0], measure.form)} → {figure(values[-1], measure.form)}"


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """Name runs by their folders, or by their paths if two folders have the same name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def write_comparison(runs: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Write `comparison.md` and its plot to a folder.

    Returns:
        The files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    from distillkit.reports.run_plots import plot_comparison

    folder.mkdir(parents=True, exist_ok=True)
    names = names_of(runs)
    plot_comparison(runs, names, folder / _COMPARISON_PLOT)
    rows = [(label, *values) for label, values in comparison(runs)]
    table = _table(("", *(_text(name) for name in names)), rows)
    text = f"# {len(runs)} runs\n\n{table}\n\n![Held-out metrics and throughput of each run]({_COMPARISON_PLOT})\n"
    (folder / _COMPARISON).write_text(text, encoding="utf-8")
    return [folder / _COMPARISON, folder / _COMPARISON_PLOT]
