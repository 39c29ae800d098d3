"""What a training run was and what came of it, read from the files it left (`metrics.jsonl` and `summary.json`) and
written as `report.md` with its plots; several runs side by side. Nothing here imports torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distillkit.reports.run_record import MEASURES, METRICS, REPORT, SUMMARY, Measure, RunRecord, read_run

__all__ = ["ReportFiles", "comparison", "write_comparison", "write_report"]

logger = logging.getLogger(__name__)

_QUALITY, _SPEED = "report-quality.png", "report-speed.png"
_COMPARISON, _COMPARISON_PLOT = "comparison.md", "comparison.png"

# While training, the report is written again only when at least this many times as long has passed as it took.
_PATIENCE = 50

# From this share of the time on, the report says what to do about waiting for data.
_MUCH_WAITING = 0.1


# -- reading -----------------------------------------------------------------------------------------------------------


# -- one run -----------------------------------------------------------------------------------------------------------


class ReportFiles:
    """The report of a run that is going on, or has just ended.

    Writing it never ends a run: what goes wrong is a warning.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._next = 0.0

    def clear(self) -> None:
        """Remove what an earlier run has left: it would be taken for this one's."""
        for name in (SUMMARY, REPORT, _QUALITY, _SPEED):
            (self.folder / name).unlink(missing_ok=True)

    def update(self) -> None:
        """Write it, unless that was done a moment ago."""
        if time.monotonic() >= self._next:
            self.finish()

    def finish(self) -> None:
        """Write it."""
        start = time.monotonic()
        try:
            write_report(read_run(self.folder))
        except Exception as error:  # noqa: BLE001 - a picture is no reason to lose hours of training
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
    pictures = _draw(run)
    path = run.folder / REPORT
    path.write_text(markdown(run, pictures), encoding="utf-8")
    return [path, *(run.folder / name for name, _ in pictures or ())]


def _draw(run: RunRecord) -> list[tuple[str, str]] | None:
    """Draw the plots that there is something to draw for: file name and title of each; None without matplotlib."""
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
    """Write a run's report.

    Args:
        run: the run.
        pictures: file name and title of its plots; None if they could not be drawn.
    """
    sections = [f"# {_text(run.name)}", _opening(run)]
    if run.evaluations:
        sections += ["## On held-out documents", _evaluations(run)]
    sections += [f"![{title}]({name})" for name, title in pictures or ()]
    if pictures is None:
        sections.append("(No plots: matplotlib is not installed. `pip install matplotlib`, then `distillkit report`.)")
    described = _described(run)
    if described:
        sections += ["## What was trained", _table(("", ""), described)]
    sections += ["## What it took", _table(("", ""), _cost(run)), *_advice(run)]
    sections += ["## Files", _files(run.folder)]
    return "\n\n".join(sections) + "\n"


def _opening(run: RunRecord) -> str:
    most = run.description.get("max_steps")
    steps = f"{run.step:,}" if most is None else f"{run.step:,} of {most:,}"
    state = "Finished" if run.summary is not None else "Not finished when this was written"
    sentence = f"{state}: {steps} steps"
    student, teacher = run.description.get("student"), run.description.get("teacher")
    if student is not None and teacher is not None:
        how = "stored distributions" if teacher["kind"] == "dataset" else "live distributions"
        whose = f"{how} of {_text(teacher['name'])}" if teacher["name"] else f"{how} of a teacher that is not named"
        sentence += f", {_text(student['path'])} learning from {whose}"
    return sentence + "."


def _evaluations(run: RunRecord) -> str:
    first, last = run.evaluations[0], run.evaluations[-1]
    rows = []
    for measure in MEASURES:
        if measure.name in last:
            before, after = first.get(measure.name), last[measure.name]
            row = [measure.label, measure.form.format(after)]
            if first["step"] != last["step"] and before is not None:
                row[1:1] = [measure.form.format(before)]
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
    """Rows of the table of what was trained; none for runs that do not say."""
    if not run.description:
        return []
    return [(label, value) for label, value in _facts(run).items() if value]


def _facts(run: RunRecord) -> dict[str, str]:
    """What was trained, a line a fact, by label."""
    d = run.description
    if not d:
        return {}
    student, settings = d["student"], d["settings"]
    trained = "" if student["trained"] == student["parameters"] else f", {student['trained']:,} trained"
    adapters = " in LoRA adapters" if student.get("adapters") else ""
    batch = settings["batch"] * settings["accumulation"] * settings["processes"]
    cut = f"{settings['batch']} at a time × {settings['accumulation']} accumulated × processes: {settings['processes']}"
    facts = {
        "student": f"{_text(student['path'])}: {student['class']}, {student['parameters']:,} parameters{trained}"
        f"{adapters}, {student['dtype']}, {student['attention']} attention",
        "teacher": _teacher(d["teacher"]),
        "losses": " + ".join(_loss(loss) for loss in d["losses"]),
    }
    for key, label in (("train", "training data"), ("eval", "held-out data")):
        if key in d["data"]:
            facts[label] = _data(d["data"][key])
    return facts | {
        "steps": f"{d['max_steps']:,} (epochs begun: {d['epochs']:,})" if "max_steps" in d else "",
        "rows a step": f"{batch:,} ({cut}), {settings['sequence_length']:,} tokens at most",
        "optimiser": f"{settings['optimizer']}, learning rate {settings['learning_rate']:g} ({settings['schedule']}, "
        f"warm-up {settings['warmup_steps']:g}), weight decay {settings['weight_decay']:g}",
        "precision": f"{settings['precision']}, "
        f"{'with' if settings['activation_checkpointing'] else 'without'} activation checkpointing",
        "machine": f"{settings['device']}, worker processes for data: {settings['workers']}",
        "seed": str(settings["seed"]),
        "versions": ", ".join(f"{name} {version}" for name, version in d["versions"].items()),
        "began": d["began"],
    }


def _teacher(teacher: dict[str, Any]) -> str:
    name = _text(teacher["name"]) if teacher["name"] else "not named in the data"
    if teacher["kind"] == "dataset":
        return f"{name}, stored" + (f" top {teacher['k']:,}" if teacher["k"] else "")
    return f"{name}, live, " + (f"top {teacher['k']:,}" if teacher["k"] else "all ids")


def _loss(loss: dict[str, Any]) -> str:
    settings = [f"{key} {value}" for key, value in loss.items() if key not in ("name", "weight")]
    return f"{loss['weight']:.4g} {loss['name']}" + (f" ({', '.join(settings)})" if settings else "")


def _data(data: dict[str, Any]) -> str:
    tokens = "" if data["tokens"] is None else f", {data['tokens']:,} tokens"
    rows = f", packed in {data['rows']:,} rows" if data.get("rows") else ""
    return f"{_text(data['path'])}: {data['documents']:,} documents{tokens}{rows}"


def _cost(run: RunRecord) -> list[tuple[str, str]]:
    from distillkit.console import human_bytes

    rows = [("steps", f"{run.step:,}")]
    if run.summary is not None:
        rows.append(("time", f"{run.summary['seconds']:,.1f} s, loading and saving included"))
        rows.append(("tokens", f"{run.summary['train_tokens']:,}"))
        if run.summary["cut_documents"]:
            cut = f"{run.summary['cut_documents']:,} documents, {run.summary['cut_tokens']:,} tokens"
            rows.append(("cut off at the sequence length", cut))
    if run.tokens_per_second is not None:
        rows.append(("tokens a second", f"{run.tokens_per_second:,.0f}"))
    if run.data_wait is not None:
        rows.append(("time spent waiting for data", f"{run.data_wait:.1%}"))
    if run.peak_memory is not None:
        rows.append(("peak memory", human_bytes(run.peak_memory)))
    return rows


def _advice(run: RunRecord) -> list[str]:
    if run.data_wait is None or run.data_wait < _MUCH_WAITING:
        return []
    workers = run.description.get("settings", {}).get("workers")
    now = "" if workers is None else f" (now {workers})"
    return [
        f"The device waited for data during {run.data_wait:.0%} of the time: raise "
        f"`training_args.dataloader_num_workers`{now}."
    ]


def _files(folder: Path) -> str:
    """Links to what is in the run's folder."""
    known = (
        (METRICS, "every log, a JSON object a line"),
        (SUMMARY, "the figures at the end"),
        ("distillkit_config.yaml", "the configuration"),
        ("config.json", "with the model's weights and tokenizer beside it: the student"),
    )
    lines = [f"- [{name}]({name}): {what}" for name, what in known if (folder / name).exists()]
    checkpoints = sorted(folder.glob("checkpoint-*/"), key=lambda path: (len(path.name), path.name))
    lines += [f"- [{path.name}]({path.name})" for path in checkpoints]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, numbers to the right."""
    rule = ["---", *("---:" if len(header) > 2 else "---" for _ in header[1:])]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: object) -> str:
    """Write a name so that Markdown takes none of it for markup."""
    return f"`{value}`".replace("|", "\\|")


# -- several runs ------------------------------------------------------------------------------------------------------


def comparison(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Lay several runs side by side: what differs in what was trained, what it brought, what it took.

    Returns:
        A label and a value for each run, a row.
    """
    from distillkit.console import human_bytes

    facts = [_facts(run) for run in runs]
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
        ("tokens a second", [_written("{:,.0f}", run.tokens_per_second) for run in runs]),
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
        return measure.form.format(values[0]) if values else ""
    return f"{measure.form.format(values[0])} → {measure.form.format(values[-1])}"


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """Name runs by their folders; by their paths where two folders have one name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def write_comparison(runs: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Write `comparison.md` and its plot.

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
    text = f"# {len(runs)} runs\n\n{table}\n\n![Held-out measures and speed of each run]({_COMPARISON_PLOT})\n"
    (folder / _COMPARISON).write_text(text, encoding="utf-8")
    return [folder / _COMPARISON, folder / _COMPARISON_PLOT]
