"""Writes reports on training runs from their `metrics.jsonl` and `summary.json`: `report.md` with plots for one run, or
a comparison of several. Nothing here imports torch."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from distillkit.console import number_of
from distillkit.errors import CorruptDataError, printable
from distillkit.reports.run_record import (
    DIFFERENCES,
    HOW,
    MEASURES,
    METRICS,
    OWN_WORDS,
    REPORT,
    SUMMARY,
    Measure,
    RunRecord,
    read_run,
)

__all__ = [
    "MARKDOWN",
    "PLAIN",
    "ReportFiles",
    "advice",
    "comparison",
    "cost",
    "described",
    "evaluation_notes",
    "evaluation_rows",
    "names_of",
    "opening",
    "source_rows",
    "table",
    "understanding",
    "write_comparison",
    "write_report",
]

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
        for name in (SUMMARY, REPORT, DIFFERENCES, _QUALITY, _SPEED):
            (self.folder / name).unlink(missing_ok=True)

    def write_differences(self, differences: dict[str, Any]) -> None:
        """Write where student and teacher differ most, in place of those of an earlier evaluation."""
        unfinished = self.folder / f".{DIFFERENCES}"
        try:
            unfinished.write_text(json.dumps(differences, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(self.folder / DIFFERENCES)
        except OSError as error:
            logger.warning("%s could not be written: %s", self.folder / DIFFERENCES, error)

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
    with understanding(run):
        pictures = _draw(run)
        text = markdown(run, pictures)
    path = run.folder / REPORT
    path.write_text(text, encoding="utf-8")
    return [path, *(run.folder / name for name, _ in pictures or ())]


def _draw(run: RunRecord) -> list[tuple[str, str]] | None:
    """Draw the plots for which there is data. Returns (file name, title) of each, or None without matplotlib."""
    from distillkit.reports.run_plots import plot_quality, plot_speed, quality_panels, speed_panels

    pictures = []
    for name, title, plot, panels in (
        (_QUALITY, "Losses and agreement with the teacher", plot_quality, quality_panels(run)),
        (_SPEED, "Speed, waiting for data, learning rate and gradients", plot_speed, speed_panels(run)),
    ):
        if panels:
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
    sections = [f"# {_text(run.name)}", opening(run, MARKDOWN)]
    if run.evaluations:
        sections += ["## On held-out documents", table(*evaluation_rows(run)), *evaluation_notes(run)]
    if run.rollouts:
        sections += ["## On the student's own completions", table(*rollout_rows(run))]
    for held_out, heading in ((True, "## Held-out datasets"), (False, "## Training datasets")):
        header, rows = source_rows(run, held_out=held_out)
        if rows:
            sections += [heading, table(header, rows)]
    sections += [f"![{title}]({name})" for name, title in pictures or ()]
    if pictures is None:
        sections.append(
            "(No plots: matplotlib is not installed. Run `pip install 'distillkit[plot]'`, then `distillkit report`.)"
        )
    facts = described(run, MARKDOWN)
    if facts:
        sections += ["## Configuration", table(("", ""), facts)]
    sections += ["## Cost", table(("", ""), cost(run)), *advice(run, MARKDOWN)]
    sections += ["## Files", _files(run.folder)]
    return "\n\n".join(sections) + "\n"


@dataclass(frozen=True)
class Quoting:
    """How names and facts from data are written, so that they mean nothing in the text around them.

    Attributes:
        name: for names, which may contain anything.
        fact: for facts, which are usually words and numbers.
    """

    name: Callable[[object], str]
    fact: Callable[[object], str]


def opening(run: RunRecord, quoting: Quoting) -> str:
    """Say in a sentence what was trained, and how far."""
    most = run.description.get("max_steps")
    steps = number_of(run.step, "step") if most is None else f"{run.step:,} of {number_of(most, 'step')}"
    state = "Finished" if run.summary is not None else "Not finished when this report was written"
    sentence = f"{state}: {steps}"
    student, teacher = run.description.get("student"), run.description.get("teacher")
    if student is not None and teacher is not None:
        how = f"{HOW[teacher['kind']]} distributions"
        whose = f"{how} of {quoting.name(teacher['name'])}" if teacher["name"] else f"{how} of an unnamed teacher"
        sentence += f", {quoting.name(student['path'])} learning from {whose}"
    return sentence + "."


def evaluation_rows(run: RunRecord) -> tuple[list[str], list[list[str]]]:
    """The first and the last evaluation as a table: its header, and a row for each measure."""
    first, last = run.evaluations[0], run.evaluations[-1]
    compared = first["step"] != last["step"]
    rows = []
    for measure in measures_of([run]):
        if measure.name in last:
            before, after = first.get(measure.name), last[measure.name]
            row = [measure.label, measure.text(after)]
            if compared:
                row[1:1] = ["" if before is None else measure.text(before)]
                row.append("" if before is None else measure.change(before, after))
            rows.append(row)
    header = ["", f"step {last['step']:,}"]
    if compared:
        header[1:1] = [f"step {first['step']:,}"]
        header.append("change")
    return header, rows


def rollout_rows(run: RunRecord) -> tuple[list[str], list[list[str]]]:
    """The first and the last round of completions by the student as a table: its header, and a row for each measure."""
    rows = []
    for measure in OWN_WORDS:
        _, values = run.series(measure.name)
        if values:
            change = measure.change(values[0], values[-1])
            rows.append([measure.label, measure.text(values[0]), measure.text(values[-1]), change])
    return ["", "first round", "last round", "change"], rows


_OF_SOURCES = (
    Measure("loss", "loss", "{:.4f}"),
    Measure("kl", "KL", "{:.4f}"),
    Measure("top1_agreement", "top-1", "{:.1%}", share=True),
)


def source_rows(run: RunRecord, *, held_out: bool) -> tuple[list[str], list[list[str]]]:
    """Each of several datasets with its first and last metrics, as a table: its header, and a row for each dataset.

    Args:
        run: the run.
        held_out: whether those that it is evaluated on, or those that it is trained on.
    """
    sources = run.sources(held_out=held_out)
    columns = {
        measure.label: [
            _ends(run, _of_source(measure, source["name"], held_out), held_out=held_out) for source in sources
        ]
        for measure in _OF_SOURCES
    }
    columns = {label: values for label, values in columns.items() if any(values)}
    header = ["dataset", "documents", "tokens", *([] if held_out else ["passes an epoch", "share of its tokens"])]
    rows = []
    for number, source in enumerate(sources):
        row = [_fact(source["name"]), f"{source['documents']:,}", _written("{:,}", source["tokens"])]
        row += [] if held_out else [f"{source['passes']:.3g}", f"{source['share']:.1%}"]
        rows.append([*row, *(values[number] for values in columns.values())])
    return [*header, *columns], rows


def _of_source(measure: Measure, name: str, held_out: bool) -> Measure:
    return replace(measure, name=f"{'eval_' if held_out else ''}{measure.name}/{name}")


def measures_of(runs: Sequence[RunRecord]) -> list[Measure]:
    """The measures that say something: if every teacher gave all ids, the probabilities of its top tokens do not."""
    masses = ("eval_student_mass", "eval_teacher_mass")
    return [measure for measure in MEASURES if measure.name not in masses or not all(run.all_ids for run in runs)]


def evaluation_notes(run: RunRecord) -> list[str]:
    """What the first and the last evaluation do not say."""
    notes = []
    steps, kl = run.series("eval_kl", held_out=True)
    if kl and min(kl) < kl[-1]:
        best = kl.index(min(kl))
        notes.append(f"KL was lowest at step {steps[best]:,}: {kl[best]:.4f}.")
    if run.evaluations and run.evaluations[0]["step"] > 0:
        notes.append(
            "The student was not evaluated before training. To compare with that, set "
            "`training_args.eval_on_start: true`."
        )
    return notes


def described(run: RunRecord, quoting: Quoting) -> list[tuple[str, str]]:
    """Rows of the configuration table; empty if the run did not record a description."""
    if not run.description:
        return []
    return [(label, value) for label, value in _facts(run, quoting).items() if value]


def _facts(run: RunRecord, quoting: Quoting) -> dict[str, str]:
    """The facts of a run's description, by label."""
    d = run.description
    if not d:
        return {}
    student, settings, fact = d["student"], d["settings"], quoting.fact
    trained = "" if student["trained"] == student["parameters"] else f", {student['trained']:,} trained"
    adapters = " in LoRA adapters" if student.get("adapters") else ""
    batch = settings["batch"] * settings["accumulation"] * settings["processes"]
    cut = f"{settings['batch']} at a time × {settings['accumulation']} accumulated × processes: {settings['processes']}"
    facts = {
        "student": f"{quoting.name(student['path'])}: {fact(student['class'])}, {student['parameters']:,} "
        f"parameters{trained}{adapters}, {fact(student['dtype'])}, {fact(student['attention'])} attention",
        "teacher": _teacher(d["teacher"], quoting),
        "losses": " + ".join(_loss(loss, fact) for loss in d["losses"]),
        "the student's own completions": _rollouts(d.get("rollouts")),
        "set on the command line": ", ".join(
            f"{fact(path)} = {fact(json.dumps(value))}" for path, value in d.get("overrides", {}).items()
        ),
    }
    for key, label in (("train", "training data"), ("eval", "held-out data")):
        if key in d["data"]:
            facts[label] = _data(d["data"][key], quoting)
    return facts | {
        "steps": f"{d['max_steps']:,} (epochs begun: {d['epochs']:,})" if "max_steps" in d else "",
        "rows per step": f"{batch:,} ({cut}), {settings['sequence_length']:,} tokens at most",
        "optimiser": f"{fact(settings['optimizer'])}, learning rate {settings['learning_rate']:g} "
        f"({fact(settings['schedule'])}, "
        f"warm-up {settings['warmup_steps']:g}), weight decay {settings['weight_decay']:g}",
        "precision": f"{fact(settings['precision'])}, "
        f"{'with' if settings['activation_checkpointing'] else 'without'} activation checkpointing",
        "machine": f"{fact(settings['device'])}, data loader workers: {fact(settings['workers'])}",
        "seed": fact(settings["seed"]),
        "versions": fact(", ".join(f"{name} {version}" for name, version in d["versions"].items())),
        "began": fact(d["began"]),
    }


def _teacher(teacher: dict[str, Any], quoting: Quoting) -> str:
    name = quoting.name(teacher["name"]) if teacher["name"] else "not recorded in the data"
    if teacher["kind"] == "dataset":
        if teacher.get("draws"):
            return f"{name}, stored draws: {teacher['draws']:,}"
        return f"{name}, stored" + (f" top {teacher['k']:,}" if teacher["k"] else "")
    sizes = teacher["k"] if isinstance(teacher["k"], list) else [teacher["k"]]
    top = " or ".join(f"{size:,}" for size in sizes if size)
    return f"{name}, {HOW[teacher['kind']]}, " + (f"top {top}" if top else "all ids")


def _loss(loss: dict[str, Any], fact: Callable[[object], str]) -> str:
    settings = [f"{fact(key)} {fact(value)}" for key, value in loss.items() if key not in ("name", "weight")]
    return f"{loss['weight']:.4g} {fact(loss['name'])}" + (f" ({', '.join(settings)})" if settings else "")


def _rollouts(rollouts: dict[str, Any] | None) -> str:
    if rollouts is None:
        return ""
    engine = rollouts.get("engine", "hf")
    written = "" if engine == "hf" else f"written by {'vLLM' if engine == 'vllm' else 'a server'}, "
    return (
        f"{written}{rollouts['fraction']:.0%} of the rows, in rounds of {number_of(rollouts['every'], 'step')}, of at "
        f"most {number_of(rollouts['max_new_tokens'], 'token')}, temperature {rollouts['temperature']:g}, top-p "
        f"{rollouts['top_p']:g}"
    )


def _data(data: dict[str, Any], quoting: Quoting) -> str:
    tokens = "" if data["tokens"] is None else f", {number_of(data['tokens'], 'token')}"
    rows = f", packed in {number_of(data['rows'], 'row')}" if data.get("rows") else ""
    if "sources" in data:
        return "; ".join(
            f"{quoting.fact(source['name'])} = {_data(_alone(source), quoting)}" for source in data["sources"]
        )
    return f"{quoting.name(data['path'])}: {number_of(data['documents'], 'document')}{tokens}{rows}"


def _alone(source: dict[str, Any]) -> dict[str, Any]:
    return {name: source[name] for name in ("path", "documents", "tokens", "rows")}


def cost(run: RunRecord) -> list[tuple[str, str]]:
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
    if run.teacher_wait is not None:
        rows.append(("time spent waiting for the teacher", f"{run.teacher_wait:.1%}"))
    if run.peak_memory is not None:
        rows.append(("peak memory", human_bytes(run.peak_memory)))
    return rows


def advice(run: RunRecord, quoting: Quoting) -> list[str]:
    found = []
    if run.data_wait is not None and run.data_wait >= _MUCH_WAITING:
        workers = run.description.get("settings", {}).get("workers")
        now = "" if workers is None else f" (now {quoting.fact(workers)})"
        found.append(
            f"The device spent {run.data_wait:.0%} of the time waiting for data: raise "
            f"`training_args.dataloader_num_workers`{now}."
        )
    if run.teacher_wait is not None and run.teacher_wait >= _MUCH_WAITING:
        found.append(
            f"The device spent {run.teacher_wait:.0%} of the time waiting for served teachers: raise "
            "`teacher.concurrency` (`teachers.N.concurrency` of one of several) if their servers can take more, or "
            "capture the distributions first."
        )
    return found


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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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


MARKDOWN = Quoting(_text, _fact)


def _plain(value: object) -> str:
    return printable(str(value)).replace("\n", "\\n") or "(no name)"


PLAIN = Quoting(_plain, _plain)
"""For a terminal or a page, which escapes what it shows."""


@contextmanager
def understanding(run: RunRecord) -> Iterator[None]:
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


def comparison(runs: Sequence[RunRecord], quoting: Quoting = PLAIN) -> list[tuple[str, list[str]]]:
    """Compare several runs: differences in configuration, results, and cost.

    Args:
        runs: the runs.
        quoting: how names are written.

    Returns:
        Rows of a label and one value per run.
    """
    from distillkit.console import human_bytes

    facts = []
    for run in runs:
        with understanding(run):
            facts.append(_facts(run, quoting))
    labels = list(dict.fromkeys(label for fact in facts for label in fact if label not in ("began", "versions")))
    rows = []
    for label in labels:
        values = [fact.get(label, "") for fact in facts]
        if len(set(values)) > 1:
            absent = ["–" if run.description else "not recorded" for run in runs]
            rows.append((label, [value or other for value, other in zip(values, absent, strict=True)]))
    rows.append(("steps", [f"{run.step:,}" + ("" if run.summary else " (not finished)") for run in runs]))
    for measure in measures_of(runs):
        ends = [_ends(run, measure) for run in runs]
        if any(ends):
            rows.append((measure.label, ends))
    for label, values in (
        ("tokens", ["" if run.summary is None else f"{run.summary['train_tokens']:,}" for run in runs]),
        ("tokens per second", [_written("{:,.0f}", run.tokens_per_second) for run in runs]),
        ("time spent waiting for data", [_written("{:.1%}", run.data_wait) for run in runs]),
        ("time spent waiting for the teacher", [_written("{:.1%}", run.teacher_wait) for run in runs]),
        ("peak memory", ["" if run.peak_memory is None else human_bytes(run.peak_memory) for run in runs]),
    ):
        if any(values):
            rows.append((label, values))
    return rows


def _written(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _ends(run: RunRecord, measure: Measure, *, held_out: bool = True) -> str:
    _, values = run.series(measure.name, held_out=held_out)
    if len(values) < 2:
        return measure.text(values[0]) if values else ""
    return f"{measure.text(values[0])} → {measure.text(values[-1])}"


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
    from distillkit.reports.run_plots import comparison_panels, plot_comparison

    folder.mkdir(parents=True, exist_ok=True)
    names = names_of(runs)
    drawn = bool(comparison_panels(runs, names))
    if drawn:
        plot_comparison(runs, names, folder / _COMPARISON_PLOT)
    rows = [(label, *values) for label, values in comparison(runs, MARKDOWN)]
    figures = table(("", *(_text(name) for name in names)), rows)
    text = f"# {len(runs)} runs\n\n{figures}\n"
    if drawn:
        text += f"\n![Held-out metrics and throughput of each run]({_COMPARISON_PLOT})\n"
    (folder / _COMPARISON).write_text(text, encoding="utf-8")
    return [folder / _COMPARISON, *([folder / _COMPARISON_PLOT] if drawn else [])]
